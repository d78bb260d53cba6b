"""Before any work: find the model, read the data, set rows aside."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from qcft.data.balance import draw_balanced
from qcft.data.encode import EncodedSet, Encoder, hint_for
from qcft.data.mix import mixed_order
from qcft.data.rows import Row, digest_rows
from qcft.data.template import Thinking
from qcft.errors import InputError
from qcft.events import Watch
from qcft.files import file_digest
from qcft.measure.catalog import Catalog
from qcft.models.adapter_config import CONFIG, WEIGHTS, read_adapter_config
from qcft.models.inputs import Inputs
from qcft.models.sources import ModelSource, resolve, weights_folder
from qcft.prepare.digests import Digests
from qcft.prepare.groups import Group, held_out_groups
from qcft.prepare.model import PreparedModel
from qcft.prepare.reading import SourceReader, with_languages
from qcft.recipe import FIDELITY, TESTS, Model, Phase, Recipe
from qcft.replay.pools import ENGLISH, HeldOutRows, Pool, make_pools

T = TypeVar("T")


class Prepared(PreparedModel):
    """A recipe with its data read. Weights are neither fetched nor loaded.

    Recipes prepared one after the other with one `memo` read and tokenise what they share once.
    """

    def __init__(self, recipe: Recipe, watch: Watch, memo: dict[Any, Any] | None = None) -> None:
        super().__init__(recipe, watch, memo)
        recipe = self.recipe
        reader = SourceReader(recipe, watch, self._once)
        self.sources = {p.name: [reader.load(s, p.name) for s in p.sources()] for p in recipe.phases}
        self.recipe = recipe = with_languages(recipe, self.sources)
        self.groups = held_out_groups(recipe, self.sources, reader)
        self.rows = {phase.name: self._training_rows(phase) for phase in recipe.phases}

    @cached_property
    def base(self) -> ModelSource | None:
        """The model that this one was tuned from, where a freeze spec depends on what that changed."""
        base = self.recipe.model.base
        return resolve(Model(name=base)) if base and self.recipe.measures_change_since_base() else None

    @cached_property
    def inputs(self) -> Inputs:
        """The files of the models, as they were when their digests were taken."""
        return Inputs([self.model, self.base])

    @cached_property
    def pools(self) -> dict[str, list[Pool]]:
        """What each phase's replay is drawn from."""
        return {p.name: self._pools(p) for p in self.recipe.phases if p.replay and p.replay.ratio > 0}

    @cached_property
    def catalog(self) -> Catalog | None:
        """The tasks that stages are evaluated on."""
        asked = self.recipe.evaluate
        return Catalog(asked, self.watch) if asked.asks_for_something else None

    @cached_property
    def base_folder(self) -> Path:
        """The weights of `model.base`, which the model was tuned from."""
        assert self.base is not None
        return weights_folder(self.base, self.watch)

    def encoder(self, phase: Phase) -> Encoder:
        """The phase's way from rows to tokens."""
        return self.encoder_for(phase.system, phase.train.max_length, phase.train.long_rows, phase.thinking)

    def group_encoder(self, group: Group) -> Encoder:
        """A held-out group's way from rows to tokens: its phase's."""
        return self.encoder_for(group.system, group.max_length, group.long_rows, group.thinking)

    def held_out(self, group: Group) -> EncodedSet:
        """A group's rows as tokens. Raises InputError when none is left to measure."""
        encoded = self.group_encoder(group).encode_all(group.rows)
        if not encoded.rows:
            of_phase = any(group.phase == phase.name for phase in self.recipe.phases)
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

    def encoded(self, phase: Phase) -> list[EncodedSet]:
        """The phase's training rows as tokens, source by source, those that are drawn where its languages are
        balanced. Raises InputError when none is left."""
        limits = (phase.system, phase.train.max_length, phase.train.long_rows, phase.thinking)
        sources = tuple(source.digest for source in self.sources[phase.name])
        rows = digest_rows(row for rows in self.rows[phase.name] for row in rows)
        key = ("tokens", self.recipe.model.model_dump_json(), limits, sources, rows)
        sets = self._once(key, lambda: self._encode(phase))
        if phase.balance == "none":
            return sets
        langs = [source.lang for source in self.sources[phase.name]]
        return draw_balanced(sets, langs, phase.balance, self.recipe.seed)

    def order(self, phase: Phase, replay_rows: int) -> Callable[[int], list[int]]:
        """The order of the phase's rows, as `encoded` gives them, and of its replay in each epoch, from 0."""
        sets = self.encoded(phase)
        new = sum(len(one.rows) for one in sets)
        by_lang = zip(self.sources[phase.name], sets, strict=True)
        langs = None if phase.balance == "none" else [source.lang for source, one in by_lang for _ in one.rows]
        return lambda epoch: mixed_order(new, replay_rows, f"{self.recipe.seed}:{epoch}", langs)

    def _encode(self, phase: Phase) -> list[EncodedSet]:
        encoder = self.encoder(phase)
        sets = []
        for source, rows in zip(self.sources[phase.name], self.rows[phase.name], strict=True):
            encoded = encoder.encode_all(rows, partial(self._tokenising, source.name, len(rows)))
            if not encoded.rows:
                raise InputError(
                    f"data: none of the {len(rows)} rows of {source.source.path!r} can train "
                    f"({_counts(encoded.left_out)})",
                    hint_for(
                        encoded.left_out,
                        f"raise {phase.name}.train.max_length or set {phase.name}.train.long_rows to cut",
                    ),
                )
            for what, n in encoded.changed.items():
                self.watch.note(f"{phase.name}, {source.name}: {n} of {len(rows)} rows: {what}")
            sets.append(encoded)
        return sets

    def replay_encoder(self, phase: Phase) -> Encoder:
        """Replay's way from rows to tokens: under the system prompt of the phase it keeps alive, and with thoughts only
        in rows that have some: answers are asked for without."""
        train = phase.train
        system = self.recipe.phases[0].system
        thinking: Thinking = "off" if phase.thinking == "off" else "auto"
        return self.encoder_for(system, train.max_length, train.long_rows, thinking)

    def english_prompts(self) -> list[tuple[Group, Row]]:
        """The held-out English rows whose prompts every stage answers."""
        for group in self.groups:
            if group.lang == ENGLISH:
                rows = {row.prompt_digest: row for row in self.held_out(group).rows}  # one may be several training rows
                ranked = sorted(rows.values(), key=lambda row: row.key)
                return [(group, row) for row in ranked[: self.recipe.answers.prompts]]
        return []

    def english_group(self, phase: Phase) -> Group | None:
        """The held-out English rows that a phase's live probe goes by: those of another phase, of `probe`, or that ship
        with qcft. None for a phase that is itself where they are from: it makes what the probe would measure."""
        others = (group for group in self.groups if group.lang == ENGLISH and group.phase != phase.name)
        return next(others, None)

    def _tokenising(self, name: str, total: int, done: int) -> None:
        if done % 500 == 0:
            self.watch.progress(f"tokenising {name}", done, total, "rows")

    def _training_rows(self, phase: Phase) -> list[tuple[Row, ...]]:
        """The phase's rows, source by source, less those held out by this phase, an earlier one or a probe.

        Rows that a later phase holds out are none of these, or are not measured; where `heldout.of` says what is
        measured, nothing of it is trained. Of one's own test sets, translations (rows of the same id) are not either.
        """
        names = [p.name for p in self.recipe.phases]
        later = () if self.recipe.heldout.of else names[names.index(phase.name) + 1 :]
        held = {row.prompt_digest for group in self.groups if group.phase not in later for row in group.rows}
        tests = [row for group in self.groups if group.phase == TESTS for row in group.rows]
        prompts, keys = {row.prompt_digest for row in tests}, {row.key for row in tests}
        kept = []
        for source in self.sources[phase.name]:
            free = [row for row in source.rows if row.prompt_digest not in prompts and row.key not in keys]
            if len(free) < len(source.rows):
                self.watch.note(
                    f"{phase.name}: {len(source.rows) - len(free):,} of {len(source.rows):,} rows of {source.name} are "
                    "not trained, as they have the prompt or the id of a row of heldout.data"
                )
            kept.append(tuple(row for row in free if row.prompt_digest not in held))
        return kept

    def _pools(self, phase: Phase) -> list[Pool]:
        """What a phase's replay is drawn from, kind by kind; never a held-out row."""
        rows = [row for group in self.groups for row in group.rows]
        held = HeldOutRows(
            frozenset(r.prompt_digest for r in rows), frozenset(r.key for r in rows), self.recipe.heldout.share
        )
        return make_pools(self.recipe, phase, self.sources, held, self.watch)

    def digests(self) -> Digests:
        """Digests of everything that the plan's ids rest on."""
        held_out = self.held_out_digest()
        tasks = self._tasks(held_out)
        return Digests(
            model=self.model.digest,
            phases={phase.name: self.rows_digest(phase) for phase in self.recipe.phases},
            replay={
                name: tuple(self._digest_rows(pool.rows, self.recipe.phases[0].system) for pool in pools)
                for name, pools in self.pools.items()
            },
            held_out=held_out,
            base=self.base.digest if self.base else None,
            english={p.name: self._digest(g) for p in self.recipe.phases if (g := self.english_group(p))},
            tasks=tasks,
            lm_eval=self.catalog.lm_eval if self.catalog else None,
            balance={phase.name: self._balance(phase) for phase in self.recipe.phases if phase.balance != "none"},
            template=self.template.traits,
        )

    def rows_digest(self, phase: Phase) -> str:
        """The digest of the rows that a phase trains on, or of its adapter."""
        if phase.adapter:
            return adapter_digest(Path(os.path.expanduser(phase.adapter)))
        rows = [row for rows in self.rows[phase.name] for row in rows]
        return self._digest_rows(rows, phase.system)

    def held_out_digest(self) -> str:
        """The digest of the rows that every stage is measured on."""
        held = hashlib.sha256()
        for group in self.groups:
            held.update(f"{self._digest(group)}\n".encode())
        return held.hexdigest()

    def _digest(self, group: Group) -> str:
        """A group's rows, and what decides how they become tokens."""
        thinking = "" if group.thinking == "auto" else f"thinking {group.thinking} "
        rows = self._digest_rows(group.rows, group.system)
        return f"{group.name} {group.system} {group.max_length} {group.long_rows} {thinking}{rows}"

    def _digest_rows(self, rows: Sequence[Row], system: str | None) -> str:
        """The digest of rows, and whether they take more than the chat template's plain reading."""
        return digest_rows(rows) + (" read otherwise" if self.template.reads_otherwise(rows, system) else "")

    def _balance(self, phase: Phase) -> dict[str, Any]:
        """What decides which rows of a phase are drawn to balance its languages."""
        rows = zip(self.sources[phase.name], self.rows[phase.name], strict=True)
        return {
            "by": phase.model_dump(mode="json")["balance"],
            "seed": self.recipe.seed,
            "languages": [[source.lang, digest_rows(own)] for source, own in rows],
        }

    def _tasks(self, held_out: str) -> dict[str, str]:
        """What stages are evaluated on: tasks with digests of their data."""
        if self.catalog is None:
            return {}
        trained = {s.lang for p in self.recipe.phases for s in p.sources() if isinstance(s.lang, str)}
        chosen = self.catalog.choose(sorted(trained - {ENGLISH}))
        for lang, names in chosen.lacking.items():
            self.watch.note(f"there is no task {', '.join(names)}: {lang} goes without", "warning")
        return {task: held_out if task == FIDELITY else digest for task, digest in chosen.tasks.items()}


def _counts(left_out: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in left_out.items())


def adapter_digest(folder: Path) -> str:
    """The digest of an adapter's config and weights. Raises InputError."""
    read_adapter_config(folder)
    return f"adapter:{file_digest(folder / CONFIG)}:{file_digest(folder / WEIGHTS)}"
