"""The rows that steps use: only those whose digests are part of the steps' ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from qcft.data.balance import draw_balanced
from qcft.data.encode import EncodedSet, Encoder, hint_for
from qcft.data.load import LoadedSource
from qcft.data.mix import mixed_order
from qcft.data.rows import Row
from qcft.errors import InputError, QcftError
from qcft.measure.catalog import Catalog
from qcft.prepare.groups import Group
from qcft.prepare.model import PreparedModel
from qcft.prepare.settings import Limits
from qcft.recipe import Temperature
from qcft.replay.pools import ENGLISH, Pool


@dataclass(frozen=True)
class PhaseRows:
    """A phase's training rows, source by source, and their digest."""

    phase: str
    digest: str
    sources: tuple[LoadedSource, ...]
    rows: tuple[tuple[Row, ...], ...]


@dataclass
class Rows:
    """The rows of a recipe whose data was read, and what else its steps depend on. `held_out` has the digest of all
    groups, `live` maps digests to single groups; `pools` gives a phase's pools with digests, one for each kind of
    replay."""

    model: PreparedModel
    phases: Mapping[str, PhaseRows] = field(default_factory=dict)
    held_out: tuple[str, Sequence[Group]] = ("", ())
    live: Mapping[str, Group] = field(default_factory=dict)
    pools: Callable[[str], Sequence[tuple[str, Pool]]] = lambda phase: ()
    base: Callable[[], Path] | None = None  # the folder of the model that the model was tuned from
    catalog: Catalog | None = None

    def encoder(self, limits: Limits) -> Encoder:
        """The encoder from rows to tokens under these limits."""
        how = (limits.system, limits.max_length, limits.long_rows, limits.thinking)
        return self.model.encoder_for(*how, limits.min_tokens)

    def group_encoder(self, group: Group) -> Encoder:
        """The encoder for a held-out group."""
        how = (group.system, group.max_length, group.long_rows, group.thinking)
        return self.model.encoder_for(*how, measuring=True)

    def groups(self, digest: str) -> Sequence[Group]:
        """The held-out groups. Raises QcftError if they do not have this digest."""
        found, groups = self.held_out
        return groups if found == digest else _others(f"the held-out rows {digest[:8]}")

    def local(self, task: str) -> str | None:
        """The local file for a task's data, if one was given."""
        return self.catalog.evaluate.local.get(task) if self.catalog else None

    def phase(self, name: str | None, digest: str) -> PhaseRows:
        """A phase's rows. Raises QcftError if they do not have this digest."""
        found = self.phases.get(name or "")
        return found if found and found.digest == digest else _others(f"the rows of {name}")

    def pool(self, phase: str | None, number: int, digest: str) -> Pool:
        """The pool of one kind of a phase's replay. Raises QcftError if it does not have this digest."""
        found, pool = self.pools(phase or "")[number]
        return pool if found == digest else _others(f"the replay rows of {phase}")

    def measured(self, group: Group) -> EncodedSet:
        """A group's rows as tokens. Raises InputError if none is left to measure."""
        encoded = self.group_encoder(group).encode_all(group.rows)
        if not encoded.rows:
            of_phase = group.phase in self.phases
            raise InputError(
                f"data: none of the {len(group.rows)} held-out rows of {group.name} can be measured "
                f"({_counts(encoded.left_out)})",
                hint_for(
                    encoded.left_out,
                    f"raise {group.phase}.train.max_length (it is {group.max_length})"
                    if of_phase
                    else f"give shorter rows: at most {group.max_length} tokens are measured",
                ),
            )
        return encoded

    def encoded(self, own: PhaseRows, limits: Limits, balance: Mapping[str, Any] | None = None) -> list[EncodedSet]:
        """A phase's training rows as tokens, source by source; only the drawn rows if its languages are balanced.

        Raises InputError if none is left.
        """
        sources = tuple(source.digest for source in own.sources)
        key = ("tokens", self.model.key, limits, sources, own.digest)
        sets = self.model.once(key, lambda: self._encode(own, limits))
        if balance is None:
            return sets
        by = balance["by"] if isinstance(balance["by"], str) else Temperature(**balance["by"])
        return draw_balanced(sets, [source.lang for source in own.sources], by, balance["seed"])

    def _encode(self, own: PhaseRows, limits: Limits) -> list[EncodedSet]:
        encoder = self.encoder(limits)
        sets = []
        for source, rows in zip(own.sources, own.rows, strict=True):
            encoded = encoder.encode_all(rows, partial(self._tokenising, source.name, len(rows)))
            if not encoded.rows:
                raise InputError(
                    f"data: none of the {len(rows)} rows of {source.source.path!r} can be used for training "
                    f"({_counts(encoded.left_out)})",
                    hint_for(
                        encoded.left_out,
                        f"raise {own.phase}.train.max_length or set {own.phase}.train.long_rows to cut",
                    ),
                )
            for what, n in encoded.changed.items():
                self.model.watch.note(f"{own.phase}, {source.name}: {n} of {len(rows)} rows: {what}")
            sets.append(encoded)
        return sets

    def _tokenising(self, name: str, total: int, done: int) -> None:
        if done % 500 == 0:
            self.model.watch.progress(f"tokenising {name}", done, total, "rows")


def english_prompts(rows: Rows, held_out: str, most: int) -> list[tuple[Group, Row]]:
    """The held-out English rows whose prompts are answered at every stage."""
    for group in rows.groups(held_out):
        if group.lang == ENGLISH and not group.is_text:
            each = {row.prompt_digest: row for row in rows.measured(group).rows}  # one may be several training rows
            return [(group, row) for row in sorted(each.values(), key=lambda row: row.key)[:most]]
    return []


def other_prompts(rows: Rows, held_out: str, most: int) -> list[tuple[Group, Row]]:
    """The first held-out rows of each other language, by their keys."""
    found: dict[str, list[tuple[Group, Row]]] = {}
    for group in rows.groups(held_out):
        if group.lang not in {ENGLISH, "?"} and not group.is_text:
            each = {row.prompt_digest: row for row in rows.measured(group).rows}
            found.setdefault(group.lang, []).extend((group, row) for row in sorted(each.values(), key=lambda r: r.key))
    return [one for prompts in found.values() for one in prompts[:most]]


def order_of(
    own: PhaseRows, sets: Sequence[EncodedSet], replay_rows: int, seed: int, balanced: bool
) -> Callable[[int], list[int]]:
    """The order of a phase's encoded rows and of its replay in each epoch, from 0."""
    new = sum(len(one.rows) for one in sets)
    by_lang = zip(own.sources, sets, strict=True)
    langs = [source.lang for source, one in by_lang for _ in one.rows] if balanced else None
    return lambda epoch: mixed_order(new, replay_rows, f"{seed}:{epoch}", langs)


def _others(what: str) -> NoReturn:
    raise QcftError(f"{what} have changed since the step was planned", "run the same command again")


def _counts(left_out: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in left_out.items())
