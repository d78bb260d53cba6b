"""How far two models of one base are apart: their parameters (MPD), and their hidden states on the same text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, cast

from qcft.errors import InputError
from qcft.events import Watch
from qcft.files import read_json, write_json, write_sealed
from qcft.inspect.apart import train_apart
from qcft.inspect.floor import seed_floor
from qcft.inspect.mpd import parameter_difference
from qcft.inspect.prompts import text_lines
from qcft.inspect.versions import (
    Version,
    check_base,
    is_plain,
    start_of,
    version_of,
    weights_folder_of,
)
from qcft.layers import decoder_layers
from qcft.measure.shifts import FEWEST_TOKENS, Shift, States, layer_outputs, layer_shifts
from qcft.models.load import free_memory, load_model, quiet_libraries
from qcft.models.switch import Adapters
from qcft.prepare.model import PreparedModel
from qcft.prepare.prepared import Prepared
from qcft.prepare.rows import Rows
from qcft.recipe.stages import DRIFT
from qcft.replay.pools import ENGLISH
from qcft.report.drift_section import floor_file, found_drift
from qcft.runner.libraries import set_environment
from qcft.runner.recipe import do_step
from qcft.runner.stored import check_parents, model_of, rows_of, stored_steps
from qcft.steps.step import Bench, Step, Work
from qcft.store import NamedRun, Store, read_run
from qcft.store.holding import working
from qcft.store.metrics import DriftFile, DriftFound, StateShift, TrainMetrics
from qcft.store.runs import add_stage, link_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT_TOKENS = 512  # of a line of a text file that are used


@dataclass(frozen=True)
class DriftRequest:
    """What is compared: stages of a run (`base`, a phase, a merge), against another run's where one is named, on how
    many held-out rows of each language, or on the lines of text files by language. `apart`: the first phase and the
    last one's data, each trained from the unmodified model."""

    run: str | None = None
    since: str | None = None
    to: str | None = None
    against: str | None = None
    rows: int = 16
    texts: Mapping[str, Path] | None = None
    apart: bool = False


def measure_drift(asked: DriftRequest, runs: Path, watch: Watch) -> tuple[NamedRun, str, DriftFound]:
    """Measure how far two models are apart, or reuse the measurement; returns the run, the stage and drift.json's
    content with the `floor` of its MPD, which is also stored beside the run's report.

    Raises InputError before any model is loaded when the two can't be compared.
    """
    set_environment()
    quiet_libraries()
    store, named = Store(runs), read_run(runs, asked.run)
    if asked.apart:
        if asked.since or asked.to or asked.against:
            raise InputError("--apart chooses both models", "omit --from, --to and --against, or omit --apart")
        other_run, since_phase, to_phase = train_apart(named, runs, watch)
        asked = replace(asked, against=other_run, since=since_phase, to=to_phase)
    recipe = named.recipe()
    last = recipe.phases[-1].name
    to = version_of(named, asked.to or last, store)
    if asked.against is not None:
        other = read_run(runs, asked.against)
        since = version_of(other, asked.since or other.recipe().phases[-1].name, store)
        since = replace(since, name=f"{other.name}.{since.name}")
        check_base(named, other, store)
    else:
        since = version_of(named, asked.since, store) if asked.since else start_of(named, to, store)
    if (since.weights, since.stack) == (to.weights, to.stack):
        raise InputError(f"drift: {since.name} and {to.name} are the same model", "name another with --from or --to")
    stored = stored_steps(named, store)
    try:
        if asked.texts:
            prepared: PreparedModel = model_of(named, stored, watch)
            texts = _file_texts(asked.texts, prepared)
        else:
            prepared = with_rows = rows_of(named, stored, watch)
            texts = _held_out_texts(with_rows, asked.rows)
    except InputError as error:
        before = None if asked.texts else _measured_before(named, since, to, stored, store)
        if before is None:
            raise
        watch.note(f"this is the earlier measurement, as {error.message}", "warning")
        return named, before.stage, found_drift(store.opened(before.id), named.folder, before.stage)
    _check_length(texts)
    step = _step(since, to, texts, prepared)
    if store.done(step.id) is None:
        check_parents([step], store, watch)
    with working(runs, named.name):
        bench = Bench(prepared, Rows(prepared), prepared.inputs, {}, store, watch)
        record = store.done(step.id, watch) or do_step(step, 1, 1, bench)
        store.reuse(step.id, step.inputs(), watch)
        add_stage(named, step.stage, step.id)
        link_stage(named, step.stage, store.folder(record["step"]))
        floor = floor_file(named.folder, step.stage)
        floor.parent.mkdir(exist_ok=True)
        write_sealed(floor, seed_floor(named, to, prepared, store, watch))
    return named, step.stage, found_drift(store.opened(step.id), named.folder, step.stage)


def _measured_before(run: NamedRun, since: Version, to: Version, stored: Sequence[Step], store: Store) -> Step | None:
    """The run's comparison of these two models that is done and intact, on any rows."""
    pair = {"from": _as_setting(since), "to": _as_setting(to)}
    for step in stored:
        if (
            step.work.version() == (Drift.kind, Drift.format)
            and pair.items() <= step.settings.items()
            and store.done(step.id) is not None
        ):
            return step
    return None


def _as_setting(version: Version) -> dict[str, object]:
    return {"weights": version.weights, "stack": list(version.stack)}


def _held_out_texts(prepared: Prepared, rows: int) -> dict[str, list[list[int]]]:
    """Held-out rows of each language, English first; where several phases have some, the earliest one's."""
    texts: dict[str, list[list[int]]] = {}
    for group in sorted(prepared.groups, key=lambda group: group.lang != ENGLISH):
        if group.lang not in texts:
            texts[group.lang] = [row.input_ids for row in prepared.held_out(group).encoded[:rows]]
    return texts


def _check_length(texts: Mapping[str, Sequence[Sequence[int]]]) -> None:
    """Check that there are enough tokens for CKA. Raises InputError."""
    for lang, rows in texts.items():
        if (tokens := sum(len(row) - 1 for row in rows)) < FEWEST_TOKENS:
            raise InputError(
                f"drift: the text in {lang} has {tokens} tokens beside the first of each row, and CKA needs "
                f"{FEWEST_TOKENS}",
                "give more text: more --rows, or a longer --text",
            )


def _file_texts(files: Mapping[str, Path], prepared: PreparedModel) -> dict[str, list[list[int]]]:
    """The lines of text files, without a chat template. Raises InputError."""
    texts = {}
    for lang, path in files.items():
        lines = text_lines(path, "drift", "give a UTF-8 file with one sentence per line")
        encoded = [list(prepared.tokenizer(line)["input_ids"])[:TEXT_TOKENS] for line in lines]
        texts[lang] = [ids for ids in encoded if len(ids) > 2]
        if not texts[lang]:
            raise InputError(f"drift: {str(path)!r} has no line of text", "give a file with one sentence per line")
    return texts


def _step(since: Version, to: Version, texts: Mapping[str, Sequence[Sequence[int]]], prepared: PreparedModel) -> Step:
    asked = prepared.asked
    work = Drift(prepared.model.digest, asked.quantize, asked.attn_implementation, since, to, texts)
    title = f"drift from {since.name} to {to.name}"
    parents = tuple(dict.fromkeys((*since.steps, *to.steps)))
    return Step(work, f"{DRIFT}{since.name}-{to.name}", title, parents=parents)


# The two models, and their parameter difference.
DriftMetrics = TypedDict("DriftMetrics", {"from": str, "to": str, "mpd": float | None})


@dataclass(frozen=True)
class Drift(Work[DriftMetrics]):
    """Compares two models on texts; languages that a killed process has measured are reused."""

    kind: ClassVar[str] = "drift"
    format: ClassVar[int] = 2  # CKA is debiased

    model: str
    quantize: str
    attn_implementation: str | None
    since: Version
    to: Version
    texts: Mapping[str, Sequence[Sequence[int]]]

    def settings(self) -> dict[str, Any]:
        """The models by their steps, the texts by their digest."""
        return {
            "model": self.model,
            "quantize": self.quantize,
            "attn_implementation": self.attn_implementation,
            "from": _as_setting(self.since),
            "to": _as_setting(self.to),
            "text": hashlib.sha256(json.dumps(self.texts).encode()).hexdigest(),
        }

    def do(self, step: Step, bench: Bench, folder: Path) -> DriftMetrics:
        """Measure, and write drift.json."""
        since, to, prepared, store = self.since, self.to, bench.model, bench.store
        moved, layers = parameter_difference(since, to, prepared, store, bench.watch)
        shifts = _shifts(since, to, self.texts, prepared, store, folder, bench.watch)
        trained = store.record(to.trained) if to.trained else None
        frozen = set(cast("TrainMetrics", trained["metrics"]).get("frozen_layers", ()) if trained else ())
        document: DriftFile = {
            "from": since.name,
            "to": to.name,
            "cka": "debiased",
            "text": {
                lang: {"rows": len(rows), "tokens": sum(len(r) - 1 for r in rows)} for lang, rows in self.texts.items()
            },
            "parameters": moved,
            "layers": [
                {
                    "layer": number,
                    "frozen": number in frozen,
                    **layer,
                    "languages": {lang: _as_record(each[number]) for lang, each in shifts.items()},
                }
                for number, layer in enumerate(layers)
            ],
        }
        write_json(folder / "drift.json", document)
        return {"from": since.name, "to": to.name, "mpd": moved["mpd"]}


def _as_record(shift: Shift) -> StateShift:
    return {"mean_shift": shift.mean_shift, "covariance_shift": shift.covariance_shift, "cka": shift.cka}


def _shifts(
    since: Version,
    to: Version,
    texts: Mapping[str, Sequence[Sequence[int]]],
    prepared: PreparedModel,
    store: Store,
    folder: Path,
    watch: Watch,
) -> dict[str, list[Shift]]:
    """How each layer's states shift, by language; both models see the same tokens at once."""
    files = {lang: folder / f"shifts-{number}.json" for number, lang in enumerate(texts)}
    missing = [lang for lang, file in files.items() if not file.is_file()]
    if missing:
        path, layers = decoder_layers(prepared.meta_model)
        config: Any = prepared.meta_model.config
        width = int(config.get_text_config().hidden_size)
        first, second = (_states(live, path) for live in _load_both(since, to, prepared, store))
        for lang in missing:
            label = f"drift of the layers' states: {lang}"
            shifts = layer_shifts(first, second, texts[lang], layers, width, watch, label)
            write_json(files[lang], [_as_record(shift) for shift in shifts])
        del first, second
        free_memory()
    return {lang: [Shift(**entry) for entry in read_json(file)] for lang, file in files.items()}


ModelGetter = Callable[[], "PreTrainedModel"]  # gives the model with its adapters live


def _load_both(since: Version, to: Version, prepared: PreparedModel, store: Store) -> list[ModelGetter]:
    """Both models: one load with adapters switched where they share weights, else both in memory."""
    stacks = [[store.opened(step).part("adapter") for step in version.stack] for version in (since, to)]
    folders = [weights_folder_of(version, prepared.folder, store) for version in (since, to)]
    model = prepared.asked
    share = since.weights == to.weights and all(is_plain(adapter) for stack in stacks for adapter in stack)
    first = Adapters(load_model(folders[0], model))
    second = first if share else Adapters(load_model(folders[1], model))
    return [partial(one.use, stack) for one, stack in zip((first, second), stacks, strict=True)]


def _states(live: ModelGetter, path: str) -> States:
    """Rows to states of a model's layers."""
    return lambda row, layers: layer_outputs(live(), path, row, layers)
