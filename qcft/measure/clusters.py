"""Which items of evaluations are one observation: questions on one text, and one question in many languages. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

CONTEXT, PARALLEL = "context", "parallel"  # what an item says of the text it is on, and of its translations


def item_clusters(tasks: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]]) -> dict[str, list[Hashable]]:
    """The cluster of every item, task by task; `tasks` gives each task's family (`xquad` of `xquad_es`) and its items.

    Items of one text are one cluster, and so are the items of a family's languages that translate one another: those
    that name the same question, else those at the same place. Where places do not correspond, independent items are
    paired by chance, which leaves an interval right. Items of earlier versions name neither text nor question.
    """
    names = [task for task, (_, items) in tasks.items() for _ in items]
    labels: list[list[Hashable]] = []
    for task, (family, items) in tasks.items():
        for place, item in enumerate(items):
            own: list[Hashable] = [(family, item.get(PARALLEL, place))]
            labels.append([*own, (task, CONTEXT, item[CONTEXT])] if CONTEXT in item else own)
    found: dict[str, list[Hashable]] = {task: [] for task in tasks}
    for task, cluster in zip(names, linked(labels), strict=True):
        found[task].append(cluster)
    return found


def linked(labels: Iterable[Iterable[Hashable]]) -> list[int]:
    """A number for each thing; things that share a label, directly or through others, have the same number."""
    parents: list[int] = []
    owners: dict[Hashable, int] = {}

    def root(thing: int) -> int:
        while parents[thing] != thing:
            parents[thing] = thing = parents[parents[thing]]
        return thing

    for thing, own in enumerate(labels):
        parents.append(thing)
        for label in own:
            parents[root(thing)] = root(owners.setdefault(label, thing))
    return [root(thing) for thing in range(len(parents))]
