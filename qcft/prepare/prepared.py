"""The preparation before any work: find the model, read the data, set rows aside."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from qcft.data.encode import EncodedSet, Encoder
from qcft.data.rows import Row, digest_rows
from qcft.events import Watch
from qcft.files import file_digest
from qcft.measure.catalog import Catalog
from qcft.models.adapter_config import CONFIG, WEIGHTS, read_adapter_config
from qcft.models.inputs import Inputs
from qcft.models.load import device
from qcft.models.sources import ModelSource, resolve, weights_folder
from qcft.prepare.digests import Digests
from qcft.prepare.groups import Group, held_out_groups
from qcft.prepare.model import PreparedModel
from qcft.prepare.reading import SourceReader, with_languages
from qcft.prepare.rows import PhaseRows, Rows, order_of
from qcft.prepare.settings import limits_of, replay_limits
from qcft.recipe import FIDELITY, TESTS, Model, Phase, Recipe
from qcft.replay.pools import ENGLISH, HeldOutRows, Pool, make_pools
from qcft.training.settings import with_optimizers


class Prepared(PreparedModel):
    """A recipe with its data read. Weights are neither downloaded nor loaded.

    Recipes that are prepared with the same `memo` read and tokenise what they share once.
    """

    def __init__(self, recipe: Recipe, watch: Watch, memo: dict[Any, Any] | None = None) -> None:
        recipe = with_optimizers(recipe, device())
        super().__init__(recipe.model, watch, memo)
        self._digests: dict[str, str] = {}
        reader = SourceReader(recipe, watch, self.once)
        self.sources = {p.name: [reader.load(s, p.name) for s in p.sources()] for p in recipe.phases}
        self.recipe = recipe = with_languages(recipe, self.sources)
        self.groups = held_out_groups(recipe, self.sources, reader)
        self.rows = {phase.name: self._training_rows(phase) for phase in recipe.phases}

    @cached_property
    def for_steps(self) -> Rows:
        """The rows in the form that steps use."""
        phases = {
            phase.name: PhaseRows(
                phase.name,
                self.rows_digest(phase),
                tuple(self.sources[phase.name]),
                tuple(self.rows[phase.name]),
            )
            for phase in self.recipe.phases
        }
        return Rows(
            PreparedModel(self.asked, self.watch, self.memo),
            phases,
            (self.held_out_digest(), self.groups),
            {self._digest(group): group for group in self.groups},
            lambda name: tuple((self._digest_rows(p.rows, self.recipe.phases[0].system), p) for p in self.pools[name]),
            lambda: self.base_folder,
            self.catalog,
        )

    @cached_property
    def base(self) -> ModelSource | None:
        """The model that this one was tuned from, if a freeze spec depends on the difference."""
        base = self.recipe.model.base
        return resolve(Model(name=base)) if base and self.recipe.measures_change_since_base() else None

    @cached_property
    def inputs(self) -> Inputs:
        """The files of the models, as they were when their digests were computed."""
        return Inputs([self.model, self.base])

    @cached_property
    def pools(self) -> dict[str, list[Pool]]:
        """The pools that each phase's replay is drawn from."""
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

    def held_out(self, group: Group) -> EncodedSet:
        """A group's rows as tokens. Raises InputError if none is left to measure."""
        return self.for_steps.measured(group)

    def encoded(self, phase: Phase) -> list[EncodedSet]:
        """The phase's training rows as tokens, source by source; only the drawn rows if its languages are balanced.
        Raises InputError if none is left."""
        balance = self._balance(phase) if phase.balance != "none" else None
        return self.for_steps.encoded(self.for_steps.phases[phase.name], limits_of(phase), balance)

    def order(self, phase: Phase, replay_rows: int) -> Callable[[int], list[int]]:
        """The order of the phase's rows, as `encoded` returns them, and of its replay in each epoch, from 0."""
        own, balanced = self.for_steps.phases[phase.name], phase.balance != "none"
        return order_of(own, self.encoded(phase), replay_rows, self.recipe.seed, balanced)

    def replay_encoder(self, phase: Phase) -> Encoder:
        """The encoder for a phase's replay."""
        return self.for_steps.encoder(replay_limits(limits_of(phase), self.recipe.phases[0].system))

    def english_group(self, phase: Phase) -> Group | None:
        """The held-out English rows for a phase's live probe: those of another phase, of `probe`, or the ones that ship
        with qcft. None if they are only from this phase itself, which trains on such rows."""
        others = [group for group in self.groups if group.lang == ENGLISH and group.phase != phase.name]
        return next((group for group in others if not group.is_text), next(iter(others), None))

    def pinned_recipe(self) -> Recipe:
        """The recipe with a hub model's revision resolved to its commit, as the run keeps it."""
        if self.model.kind != "hub":
            return self.recipe
        pinned = self.recipe.model.model_copy(update={"revision": self.model.digest.rsplit("@", 1)[1]})
        return self.recipe.model_copy(update={"model": pinned})

    def _training_rows(self, phase: Phase) -> list[tuple[Row, ...]]:
        """The phase's rows, source by source, without those held out by this phase, an earlier one or a probe.

        Rows that a later phase holds out are kept: they are not measured there. With `heldout.of`, no measured row is
        trained on. Rows with the id of a row of your own test sets (its translations) are dropped too.
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
                    "not trained on, as they have the prompt or the id of a row of heldout.data"
                )
            kept.append(tuple(row for row in free if row.prompt_digest not in held))
        return kept

    def _pools(self, phase: Phase) -> list[Pool]:
        """The pools that a phase's replay is drawn from, kind by kind, without held-out rows."""
        rows = [row for group in self.groups for row in group.rows]
        held = HeldOutRows(
            frozenset(r.prompt_digest for r in rows), frozenset(r.key for r in rows), self.recipe.heldout.share
        )
        return make_pools(self.recipe, phase, self.sources, held, self.watch)

    def digests(self) -> Digests:
        """Digests of everything that the plan's ids depend on."""
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
        if phase.name not in self._digests:
            rows = [row for rows in self.rows[phase.name] for row in rows]
            self._digests[phase.name] = self._digest_rows(rows, phase.system)
        return self._digests[phase.name]

    def held_out_digest(self) -> str:
        """The digest of the rows that every stage is measured on."""
        held = hashlib.sha256()
        for group in self.groups:
            held.update(f"{self._digest(group)}\n".encode())
        return held.hexdigest()

    def _digest(self, group: Group) -> str:
        """A group's digest: its rows, and the settings that decide how they become tokens."""
        thinking = "" if group.thinking == "auto" else f"thinking {group.thinking} "
        rows = self._digest_rows(group.rows, group.system)
        return f"{group.name} {group.system} {group.max_length} {group.long_rows} {thinking}{rows}"

    def _digest_rows(self, rows: Sequence[Row], system: str | None) -> str:
        """The digest of rows, and whether the chat template needs special treatment for them."""
        return digest_rows(rows) + (" read otherwise" if self.template.reads_otherwise(rows, system) else "")

    def _balance(self, phase: Phase) -> dict[str, Any]:
        """The settings and digests that decide which rows of a phase are drawn to balance its languages."""
        rows = zip(self.sources[phase.name], self.rows[phase.name], strict=True)
        return {
            "by": phase.model_dump(mode="json")["balance"],
            "seed": self.recipe.seed,
            "languages": [[source.lang, digest_rows(own)] for source, own in rows],
        }

    def _tasks(self, held_out: str) -> dict[str, str]:
        """The tasks that stages are evaluated on, with digests of their data."""
        if self.catalog is None:
            return {}
        trained = {s.lang for p in self.recipe.phases for s in p.sources() if isinstance(s.lang, str)}
        chosen = self.catalog.choose(sorted(trained - {ENGLISH}))
        for lang, names in chosen.lacking.items():
            self.watch.note(f"there is no task {', '.join(names)}: {lang} is not evaluated on it", "warning")
        return {task: held_out if task == FIDELITY else digest for task, digest in chosen.tasks.items()}


def adapter_digest(folder: Path) -> str:
    """The digest of an adapter's config and weights. Raises InputError."""
    read_adapter_config(folder)
    return f"adapter:{file_digest(folder / CONFIG)}:{file_digest(folder / WEIGHTS)}"
