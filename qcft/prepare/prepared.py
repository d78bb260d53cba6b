"""Before any work: find the model, read the data, set rows aside."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from qcft.data.encode import EncodedSet, Encoder
from qcft.data.load import LoadedSource, load_source
from qcft.data.rows import Row, digest_rows
from qcft.errors import InputError
from qcft.events import Watch
from qcft.files import file_digest
from qcft.measure.catalog import Catalog
from qcft.models.adapter_config import CONFIG, WEIGHTS, read_adapter_config
from qcft.models.load import device
from qcft.models.meta import model_without_weights
from qcft.models.sources import ModelSource, described_folder, resolve, weights_folder
from qcft.prepare.digests import Digests
from qcft.recipe import FIDELITY, Dial, Goal, Measured, Model, Phase, Recipe, Source
from qcft.replay.pools import ENGLISH, SHIPPED_ENGLISH, HeldOutRows, Pool, make_pools
from qcft.training.settings import with_optimizers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
PROBE_LENGTH = 1024  # tokens of a row that is only measured


@dataclass(frozen=True)
class Group:
    """Held-out rows measured together: those of one phase in one language."""

    phase: str
    lang: str
    rows: tuple[Row, ...]
    system: str | None
    max_length: int
    long_rows: str

    @property
    def name(self) -> str:
        """`phase2 es`."""
        return f"{self.phase} {self.lang}"


class Prepared:
    """A recipe with its data read. Weights are neither fetched nor loaded.

    Recipes prepared one after the other with one `memo` read and tokenise what they share once.
    """

    def __init__(
        self, recipe: Recipe, watch: Watch, goal: Goal | Dial | None = None, memo: dict[Any, Any] | None = None
    ) -> None:
        self.recipe = recipe = with_optimizers(recipe, device())
        self.watch = watch
        self._memo: dict[Any, Any] = {} if memo is None else memo
        self.model: ModelSource = self._once(("model", recipe.model.model_dump_json()), lambda: resolve(recipe.model))
        base = recipe.model.base
        self.base = resolve(Model(name=base)) if base and recipe.measures_change_since_base() else None
        self.sources = {phase.name: [self._load(s) for s in phase.sources()] for phase in recipe.phases}
        self.groups = self._groups()
        self.rows = {phase.name: self._training_rows(phase) for phase in recipe.phases}
        self.pools = {p.name: self._pools(p) for p in recipe.phases if p.replay and p.replay.ratio > 0}
        asked = recipe.evaluate.asks_for_something and goal is None
        self.catalog = Catalog(recipe.evaluate, watch) if asked else None

    @cached_property
    def folder(self) -> Path:
        """The folder with the model's 16-bit weights; fetched or converted when first asked for."""
        return weights_folder(self.model, self.watch)

    @cached_property
    def described(self) -> Path:
        """A folder with the model's config and tokenizer, perhaps without its weights."""
        return self.__dict__.get("folder") or described_folder(self.model, self.watch)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with the recipe's chat template."""
        from qcft.models.load import load_tokenizer

        return self._once(
            ("tokenizer", self.recipe.model.model_dump_json()),
            lambda: load_tokenizer(self.described, self.recipe.model),
        )

    @cached_property
    def meta_model(self) -> PreTrainedModel:
        """The model's modules without their weights."""
        return self._once(
            ("meta model", self.recipe.model.model_dump_json()),
            lambda: model_without_weights(self.described, self.recipe.model),
        )

    @cached_property
    def base_folder(self) -> Path:
        """The weights of `model.base`, which the model was tuned from."""
        assert self.base is not None
        return weights_folder(self.base, self.watch)

    def encoder(self, phase: Phase) -> Encoder:
        """The phase's way from rows to tokens."""
        return Encoder(self.tokenizer, phase.system, phase.train.max_length, phase.train.long_rows)

    def held_out(self, group: Group) -> EncodedSet:
        """A group's rows as tokens. Raises InputError when none is left to measure."""
        encoded = Encoder(self.tokenizer, group.system, group.max_length, group.long_rows).encode_all(group.rows)
        if not encoded.rows:
            raise InputError(
                f"data: none of the {len(group.rows)} held-out rows of {group.name} can be measured "
                f"({_counts(encoded.left_out)})",
                f"raise {group.phase}.train.max_length (it is {group.max_length}), or look at the rows",
            )
        return encoded

    def encoded(self, phase: Phase) -> list[EncodedSet]:
        """The phase's training rows as tokens, source by source. Raises InputError when none is left."""
        limits = (phase.system, phase.train.max_length, phase.train.long_rows)
        sources = tuple(source.digest for source in self.sources[phase.name])
        rows = digest_rows(row for rows in self.rows[phase.name] for row in rows)
        key = ("tokens", self.recipe.model.model_dump_json(), limits, sources, rows)
        return self._once(key, lambda: self._encode(phase))

    def _encode(self, phase: Phase) -> list[EncodedSet]:
        encoder = self.encoder(phase)
        sets = []
        for source, rows in zip(self.sources[phase.name], self.rows[phase.name], strict=True):
            encoded = encoder.encode_all(rows, partial(self._tokenising, source.name, len(rows)))
            if not encoded.rows:
                raise InputError(
                    f"data: none of the {len(rows)} rows of {source.source.path!r} can train "
                    f"({_counts(encoded.left_out)})",
                    f"raise {phase.name}.train.max_length or set {phase.name}.train.long_rows to cut",
                )
            sets.append(encoded)
        return sets

    def replay_encoder(self, phase: Phase) -> Encoder:
        """Replay's way from rows to tokens: under the system prompt of the phase it keeps alive."""
        train = phase.train
        return Encoder(self.tokenizer, self.recipe.phases[0].system, train.max_length, train.long_rows)

    def english_prompts(self) -> list[tuple[Group, Row]]:
        """The held-out English rows whose prompts every stage answers."""
        for group in self.groups:
            if group.lang == ENGLISH:
                ranked = sorted(self.held_out(group).rows, key=lambda row: row.key)
                return [(group, row) for row in ranked[: self.recipe.answers.prompts]]
        return []

    def english_group(self, phase: Phase) -> Group | None:
        """The held-out English rows that a phase's live probe goes by: those of another phase, of `probe`, or that ship
        with qcft. None for a phase that is itself where they are from: it makes what the probe would measure."""
        others = (group for group in self.groups if group.lang == ENGLISH and group.phase != phase.name)
        return next(others, None)

    def pinned_recipe(self) -> Recipe:
        """The recipe with a hub model's revision resolved to its commit, as the run keeps it."""
        if self.model.kind != "hub":
            return self.recipe
        pinned = self.recipe.model.model_copy(update={"revision": self.model.digest.rsplit("@", 1)[1]})
        return self.recipe.model_copy(update={"model": pinned})

    def _tokenising(self, name: str, total: int, done: int) -> None:
        if done % 500 == 0:
            self.watch.progress(f"tokenising {name}", done, total, "rows")

    def _load(self, source: Source) -> LoadedSource:
        held_out = self.recipe.heldout
        return self._once(
            ("source", source.model_dump_json(), held_out.share, held_out.rows),
            lambda: load_source(source, held_out, self.watch),
        )

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._memo:
            self._memo[key] = make()
        return cast("T", self._memo[key])

    def _groups(self) -> list[Group]:
        """Held-out rows by phase and language; English that ships with qcft where no source is English."""
        groups = []
        trained: set[str] = set()
        for one in self.recipe.heldout.of:
            sources = [self._load(s) for source in one.data for s in source.expanded()]
            groups += self._grouped(one, sources, trained)
        for phase in () if self.recipe.heldout.of else self.recipe.phases:
            train = phase.train
            limits = Measured(
                name=phase.name, data=[], system=phase.system, max_length=train.max_length, long_rows=train.long_rows
            )
            groups += self._grouped(limits, self.sources[phase.name], trained)
            trained |= {row.prompt_digest for source in self.sources[phase.name] for row in source.rows}
        probes = [one for source in self.recipe.probe for one in source.expanded()]
        if not any(g.lang == ENGLISH for g in groups) and not any(s.lang == ENGLISH for s in probes):
            probes.append(Source(path=SHIPPED_ENGLISH, lang=ENGLISH))
        first = self.recipe.phases[0]
        limits = Measured(
            name="probe", data=[], system=first.system, max_length=PROBE_LENGTH, long_rows=first.train.long_rows
        )
        return groups + self._grouped(limits, [self._load(s) for s in probes], trained)

    def _grouped(self, limits: Measured, sources: list[LoadedSource], trained: set[str]) -> list[Group]:
        by_lang: dict[str, dict[str, Row]] = {}
        for source in sources:
            rows = by_lang.setdefault(source.lang, {})
            for row in source.held_out:  # one row of each prompt, and none that an earlier phase trains on
                if row.prompt_digest not in trained:
                    rows.setdefault(row.prompt_digest, row)
        most = None if self.recipe.heldout.of else self.recipe.heldout.rows
        return [
            Group(limits.name, lang, tuple(rows.values())[:most], limits.system, limits.max_length, limits.long_rows)
            for lang, rows in by_lang.items()
            if rows
        ]

    def _training_rows(self, phase: Phase) -> list[tuple[Row, ...]]:
        """The phase's rows, source by source, less those held out by this phase, an earlier one or a probe.

        Rows that a later phase holds out are none of these, or are not measured; where `heldout.of` says what is
        measured, nothing of it is trained.
        """
        names = [p.name for p in self.recipe.phases]
        later = () if self.recipe.heldout.of else names[names.index(phase.name) + 1 :]
        held = {row.prompt_digest for group in self.groups if group.phase not in later for row in group.rows}
        return [tuple(r for r in s.rows if r.prompt_digest not in held) for s in self.sources[phase.name]]

    def _pools(self, phase: Phase) -> list[Pool]:
        """What a phase's replay is drawn from, kind by kind; never a held-out row."""
        rows = [row for group in self.groups for row in group.rows]
        held = HeldOutRows(
            frozenset(r.prompt_digest for r in rows), frozenset(r.key for r in rows), self.recipe.heldout.share
        )
        return make_pools(self.recipe, phase, self.sources, held, self.watch)

    def digests(self) -> Digests:
        """Digests of everything that the plan's ids rest on."""
        phases = {}
        for phase in self.recipe.phases:
            if phase.adapter:
                phases[phase.name] = _adapter_digest(Path(os.path.expanduser(phase.adapter)))
            else:
                phases[phase.name] = digest_rows(r for rows in self.rows[phase.name] for r in rows)
        held = hashlib.sha256()
        for group in self.groups:
            held.update(f"{_digest(group)}\n".encode())
        tasks = self._tasks(held.hexdigest())
        return Digests(
            model=self.model.digest,
            phases=phases,
            replay={name: tuple(digest_rows(pool.rows) for pool in pools) for name, pools in self.pools.items()},
            held_out=held.hexdigest(),
            base=self.base.digest if self.base else None,
            english={p.name: _digest(g) for p in self.recipe.phases if (g := self.english_group(p))},
            tasks=tasks,
            lm_eval=self.catalog.lm_eval if self.catalog else None,
        )

    def _tasks(self, held_out: str) -> dict[str, str]:
        """What stages are evaluated on: tasks with digests of their data."""
        if self.catalog is None:
            return {}
        trained = {s.lang for p in self.recipe.phases for s in p.sources() if isinstance(s.lang, str)}
        chosen = self.catalog.choose(sorted(trained - {ENGLISH}))
        for lang, names in chosen.lacking.items():
            self.watch.note(f"there is no task {', '.join(names)}: {lang} goes without", "warning")
        return {task: held_out if task == FIDELITY else digest for task, digest in chosen.tasks.items()}


def _digest(group: Group) -> str:
    """A group's rows, and what decides how they become tokens."""
    return f"{group.name} {group.system} {group.max_length} {group.long_rows} {digest_rows(group.rows)}"


def _counts(left_out: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in left_out.items())


def _adapter_digest(folder: Path) -> str:
    read_adapter_config(folder)
    return f"adapter:{file_digest(folder / CONFIG)}:{file_digest(folder / WEIGHTS)}"
