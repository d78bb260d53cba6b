"""Writes a phase's model as one GGUF file: checked before any work, and measured afterwards for what it kept."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qcft.errors import ChangedInput, InputError, Interrupted, QcftError, nearest
from qcft.events import Watch
from qcft.files import read_json
from qcft.models.gguf_tools import Tools, convert, find_tools, quantize
from qcft.models.gguf_write import TYPES, check_writable, write_gguf
from qcft.models.load import load_gguf, load_tokenizer
from qcft.models.meta import read_config
from qcft.models.ollama import check_name, write_modelfile
from qcft.models.sources import check_gguf, described_folder, resolve
from qcft.recipe import Recipe
from qcft.recipe.stages import kept_stage
from qcft.runner.export import fill_model
from qcft.runner.libraries import quiet, set_environment
from qcft.runner.stored import rows_of, stored_steps
from qcft.steps.kept import Kept
from qcft.steps.step import Bench
from qcft.store import NamedRun, Store
from qcft.store.metrics import KeptMetrics
from qcft.words import counted

SPM = "tokenizer.model"  # SentencePiece's own file, which the converter reads if it exists


@dataclass(frozen=True)
class GgufRequest:
    """How to write a GGUF file: its type, with llama.cpp's converter or without, the tools, and a name for Ollama."""

    kind: str
    convert: bool
    tools: Tools
    ollama: str | None


def check_gguf_asked(
    recipe: Recipe, kind: str, llama_cpp: Path | None, ollama: str | None, watch: Watch
) -> GgufRequest:
    """Raise InputError before any work if the file cannot be written.

    qcft itself writes the families that it supports, whatever is installed; llama.cpp's converter writes the others,
    and all families if its folder is given.
    """
    if kind not in TYPES:
        raise InputError(f"--gguf {kind!r} is not known", nearest(kind, [*TYPES]) + f"give one of {', '.join(TYPES)}")
    if ollama is not None:
        check_name(ollama)
    tools = find_tools(llama_cpp)
    if kind == "q4_k_m" and not tools.can_quantize:
        raise InputError(
            "--gguf q4_k_m: llama.cpp's llama-quantize was not found on PATH",
            "give llama.cpp's folder with --llama-cpp, or pip install llama-cpp-python; or use --gguf q8_0",
        )
    set_environment()
    converts = tools.given and tools.converter is not None
    try:
        source = resolve(recipe.model)
    except InputError:  # the model is gone: the merged one is checked while it is written
        return GgufRequest(kind, converts, tools, ollama)
    if not converts:
        try:
            folder = described_folder(source, watch)
            check_writable(folder, recipe.model, load_tokenizer(folder, recipe.model))
        except InputError as error:
            if tools.converter is None or not error.message.startswith("--gguf"):
                raise
            converts = True
    return GgufRequest(kind, converts, tools, ollama)


def write_file(recipe: Recipe, model: Path, file: Path, asked: GgufRequest, watch: Watch) -> None:
    """Write a merged model's folder as a GGUF file, with a Modelfile beside it if Ollama is requested."""
    quiet()
    with _whole_model(recipe, model, file.parent, watch) as folder:
        plain = file if asked.kind != "q4_k_m" else folder / "16bit.gguf"
        kind = asked.kind if plain is file else "bf16"
        if asked.convert:
            convert(asked.tools, folder, plain, kind, watch)
        else:
            write_gguf(folder, plain, kind, recipe.name, recipe.model, watch)
        if plain is not file:
            quantize(asked.tools, plain, file, watch)
        check_gguf(file)
        if asked.ollama is None:
            return
        tokenizer = load_tokenizer(folder, recipe.model)
        ends = (read_json(folder / "generation_config.json") or {}).get("eos_token_id", tokenizer.eos_token_id)
        positions = read_config(folder, recipe.model).get_text_config().max_position_embeddings
        ends = ends if isinstance(ends, list) else [ends]
        if not write_modelfile(file.parent, file.name, tokenizer, ends, positions):
            watch.note(
                "the Modelfile has no TEMPLATE: this chat template does more than put text around turns; Ollama uses "
                "its own template for a model that it knows, or completes plain text",
                "warning",
            )


def kept_in_file(run: NamedRun, stage: str, file: Path, model: Path, runs: Path, watch: Watch) -> KeptMetrics | None:
    """What the file kept of a phase's gain, on the same rows and by the same definition as the merge's `kept`.

    The file's weights are read dequantised. None if it cannot be measured; a warning says why.
    """
    store, why = Store(runs), "a part of a phase's delta has no gain of its own"
    stored = stored_steps(run, store)
    step = next((one for one in stored if one.stage == kept_stage(stage)), None)
    try:
        if step is not None:
            prepared = rows_of(run, stored, watch)
            rows = prepared.for_steps
            bench = Bench(rows.model, rows, prepared.inputs, {one.id: one for one in stored}, store, watch)
            work = Kept(tuple(step.settings["phases"]), step.settings["quantize"])
            named = replace(step, title=f"check what {file.name} kept")
            return work.compare(named, bench, lambda: load_gguf(file, model, rows.model.asked))
    except QcftError as error:
        if isinstance(error, (Interrupted, ChangedInput)):
            raise
        why = error.message
    watch.note(f"what {file.name} kept was not measured: {why}", "warning")
    return None


def kept_line(kept: KeptMetrics | None, quantize: str) -> str:
    """What a file kept, in a sentence; `quantize`: the precision that the run trained in."""
    if kept is None:
        return "What the file kept of the gain was not measured."
    gain, loss, trained = kept["gain"], kept["loss"], "NF4" if quantize == "nf4" else "16 bits"
    rows = counted(gain["rows"], "held-out row")
    if kept["share"] is None:
        return (
            f"What the file kept is not measurable: a gain of {gain['value']:.3f} nats on {rows} is below 0.05 or its "
            f"interval includes zero. Its NLL is {loss['value']:+.3f} nats from the live adapter's in {trained}."
        )
    return (
        f"The file kept {kept['share']:.0%} of a gain of {gain['value']:.3f} nats on {rows} (base and live adapter in "
        f"{trained}, as trained{'; a more exact file can keep over 100%' if quantize == 'nf4' else ''})."
    )


@contextmanager
def _whole_model(recipe: Recipe, model: Path, beside: Path, watch: Watch) -> Iterator[Path]:
    """A folder with a merged model and the tokenizer that it was trained with: its weights are links."""
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=beside) as place:
        folder = Path(place)
        fill_model(recipe, model, folder, watch, _link)
        with suppress(InputError, FileNotFoundError):  # the original model is gone, or has no such file
            shutil.copyfile(described_folder(resolve(recipe.model), watch) / SPM, folder / SPM)
        yield folder


def _link(source: Path, target: Path) -> None:
    """Link to weights, copy other files, which are changed; copy both if the disk has no links."""
    try:
        if source.suffix == ".safetensors":
            target.symlink_to(os.path.abspath(source))
            return
    except OSError:
        pass
    shutil.copyfile(source, target)
