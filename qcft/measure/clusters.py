"""Which evaluation items are one observation: questions on one text, and one question in many languages. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

CONTEXT, PARALLEL = (
    "context",
    "parallel",
)  # an item's text, and the id that its translations share


def item_clusters(tasks: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]]) -> dict[str, list[Hashable]]:
    """The cluster of every item, task by task; `tasks` gives each task's family (`xquad` of `xquad_es`) and its items.

    Items on one text are one cluster, and so are translations of one item in the languages of a family: items with
    the same question id, else items at the same position. Where positions do not correspond, independent items are
    paired at random, and the interval remains valid. Items of earlier versions have neither text nor question id.
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
    """A cluster number for each thing; things that share a label, directly or through others, have the same one."""
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
