"""Before any work: find the model, read the data, plan the steps, and check what can be checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from qcft.data.encode import EncodedSet, Encoder
from qcft.data.load import LoadedSource, load_source
from qcft.data.rows import Row, digest_rows
from qcft.errors import InputError, QcftError
from qcft.events import Watch
from qcft.files import file_digest, read_json
from qcft.measure.catalog import Catalog
from qcft.models.adapters import read_adapter_config
from qcft.models.deltas import CONFIG, WEIGHTS, check_biases, check_factors, check_shape, check_stack, read_adapter
from qcft.models.merge import MARK
from qcft.models.meta import model_without_weights
from qcft.models.sources import ModelSource, described_folder, resolve, weights_folder
from qcft.models.tensors import weight_names
from qcft.pipeline.abilities import alpaca_prompts
from qcft.pipeline.pools import ENGLISH, SHIPPED_ENGLISH, HeldOutRows, Pool, make_pools
from qcft.pipeline.replay import check_replay
from qcft.plan import Digests, Plan, make_plan
from qcft.recipe import ALPACA_EVAL, FIDELITY, Dial, Goal, Measured, Model, Phase, Recipe, Source, parse_freeze

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
MOST_ROWS = 10**8  # of all epochs: a consumer's card is at it for years
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
    """A recipe with its data read and its steps planned. Weights are neither fetched nor loaded.

    Recipes prepared one after the other with one `memo` read and tokenise what they share once.
    """

    def __init__(
        self, recipe: Recipe, watch: Watch, goal: Goal | Dial | None = None, memo: dict[Any, Any] | None = None
    ) -> None:
        self.recipe = recipe
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
        self.plan: Plan = make_plan(recipe, self._digests(), goal)

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

    def check(self, weights: bool = True) -> None:
        """Check what needs the model's config and tokenizer; with `weights`, also the names of the weights that are
        then fetched, but none are loaded. Raises InputError."""
        from qcft.training.settings import check_settings

        folder = self.folder if weights else self.described
        mark = read_json(folder / MARK) or {}
        if mark.get("merged_onto") == "dequantised" and self.recipe.model.quantize != "none":
            raise InputError(
                f"model: {self.recipe.model.name!r} was merged onto a dequantised base, to be used in 16 bits; "
                "in 4 bits again it loses what was learned",
                "merge it without --base dequantised, or --set model.quantize=none",
            )
        for group in self.groups:
            self.held_out(group)
        for phase in self.recipe.phases:
            if phase.adapter:
                self._check_adapter(Path(os.path.expanduser(phase.adapter)))
                continue
            self._check_layers(phase, weights)
            check_settings(phase.train)
            new = self.encoded(phase)
            _check_length(phase, sum(len(one.rows) for one in new))
            if phase.replay and phase.replay.ratio > 0:
                check_replay(phase, self.pools[phase.name], new, self.replay_encoder(phase))

    def check_tasks(self, tasks: Iterable[str]) -> None:
        """Check that what stages are evaluated on can be had: data, columns, packages. Raises InputError."""
        for task in tasks:
            assert self.catalog is not None
            self.catalog.check(task)
            if task == ALPACA_EVAL:
                alpaca_prompts(self.recipe.evaluate.local.get(ALPACA_EVAL))

    def _check_layers(self, phase: Phase, weights: bool) -> None:
        """Check that the freeze spec and the targets fit the model, and that its deltas can be merged."""
        from qcft.layers import adapted_modules, linear_modules

        modules = adapted_modules(self.meta_model, self.recipe.lora.targets, phase.freeze, self.recipe.seed)
        full = max(min(module.shape) for module in linear_modules(self.meta_model, self.recipe.lora.targets))
        if self.recipe.lora.r > full:
            raise InputError(
                f"recipe: lora.r: {self.recipe.lora.r} is more than the rank that any change of this model can have",
                f"use at most {full}, the smaller side of its largest matrix; 8 to 64 are common",
            )
        if not weights or phase.name == self.recipe.phases[-1].name:
            return
        missing = {f"{name}.weight" for name in modules} - weight_names(self.folder)
        if missing:
            raise InputError(
                f"model: {self.recipe.model.name!r} stores its weights under other names than {min(missing)}",
                f"{phase.name} could not be merged onto them: load it with transformers and save it again",
            )

    def _check_adapter(self, folder: Path) -> None:
        """Check that an adapter made elsewhere fits the model."""
        weights = {name: tuple(weight.shape) for name, weight in self.meta_model.state_dict().items()}
        hint = f"it was made for another model than {self.recipe.model.name!r}"
        adapter = read_adapter(folder)
        if any(phase.start == "stacked" for phase in self.recipe.phases[1:]):
            check_stack([adapter, adapter])
        if any(parse_freeze(phase.freeze).measure == "change" for phase in self.recipe.phases[1:]):
            check_factors(adapter)
        check_biases(adapter, weights)
        for name, change in adapter.changes.items():
            if name not in weights:
                raise InputError(f"adapter: {str(folder)!r} changes {name}, which the model lacks", hint)
            try:
                check_shape(name, change, weights[name], adapter.transposed)
            except QcftError as error:
                raise InputError(f"adapter: {str(folder)!r}: {error.message}", hint) from None
        said = str((read_json(folder / CONFIG) or {}).get("base_model_name_or_path") or "")
        if said and _last(said) not in {_last(self.recipe.model.name), _last(str(self.described))}:
            self.watch.note(
                f"the adapter {str(folder)!r} says it is of {said!r}, not {self.recipe.model.name!r}", "warning"
            )

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

    def _digests(self) -> Digests:
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


def _last(model: str) -> str:
    """A model's name without owner or folders, which are others elsewhere."""
    return Path(model).name.lower()


def _check_length(phase: Phase, rows: int) -> None:
    """Refuse what no machine gets through, and memory cannot even lay out."""
    train = phase.train
    total = train.steps * train.batch if train.steps else train.epochs * rows
    if total > MOST_ROWS:
        key = "steps" if train.steps else "epochs"
        raise InputError(
            f"recipe: {phase.name}.train.{key}: {getattr(train, key):g} come to {total:.2g} rows to train on",
            f"{MOST_ROWS:,} are the most that qcft lays out",
        )


def _counts(left_out: dict[str, int]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in left_out.items())


def _adapter_digest(folder: Path) -> str:
    read_adapter_config(folder)
    return f"adapter:{file_digest(folder / CONFIG)}:{file_digest(folder / WEIGHTS)}"
