"""Merging LoRA adapters onto the original 16-bit weights, tensor by tensor.

Adapters are never merged into 4-bit weights and, before another 4-bit phase, never onto a dequantised base: once the
result is quantised to 4 bits again, both lose nearly everything the adapter learned.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qcft.data.mix import in_groups
from qcft.errors import QcftError
from qcft.events import Watch
from qcft.files import read_json, write_json
from qcft.models.deltas import AdapterChanges, Delta, Scale, check_biases, check_shape, check_stack, read_adapter
from qcft.models.meta import model_without_weights
from qcft.models.names import TIED, stored_names
from qcft.models.size import quantised_modules
from qcft.models.tensors import (
    DTYPES,
    FLOATS,
    TORCH_NAMES,
    PlannedTensor,
    StoredTensor,
    stored_weights,
    write_bytes,
    write_tensors,
)
from qcft.private import of
from qcft.recipe import Model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SHARD_BYTES = 10**9
BLOCK = 1 << 19  # numbers that are changed at a time; small enough for the processor's cache
MARK = "qcft_merge.json"  # records how a folder was merged, where that limits how it may be loaded
COPIED = {".json", ".jinja", ".model", ".txt", ".py"}  # config, tokenizer, chat template, a model's own code


@dataclass(frozen=True)
class Target:
    """The result's dtype (None: that of each tensor in the base), and what the adapters are merged onto.

    `dequantised`: the base after quantisation to 4 bits and back to 16. The adapter was trained on these weights, so
    in 16 bits the result is the trained model; quantised to 4 bits again, it loses the adapter.
    """

    dtype: str | None = None
    dequantised: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class _Source:
    """Where an output tensor comes from: the stored tensor, and the adapters that change it."""

    stored: StoredTensor
    adapters: tuple[AdapterChanges, ...]
    dequantised: bool


def merge_adapters(
    base: Path,
    adapters: Sequence[Path | tuple[Path, Scale]],
    to: Path,
    watch: Watch,
    target: Target = Target(),
) -> int:
    """Write base + adapters as a model folder: W + s1 B1 A1 + s2 B2 A2..., added in fp32, rounded once.

    An adapter may have a scale: (folder, 0.7), or a function from a weight's name to its scale. Everything is checked
    before anything is written. One tensor is in memory at a time; shards are at most 1 GB. Weights that are tied in the
    base but get different values from the adapters are untied in the result. Returns the number of changed weights.
    Raises QcftError if an adapter does not fit the base, InputError for one that cannot be merged.
    """
    read = [read_adapter(*(entry if isinstance(entry, tuple) else (entry,))) for entry in adapters]
    check_stack(read)
    sources, untied = _plan(base, read, target)
    planned = [
        PlannedTensor(name, _dtype(source.stored.dtype, target), source.stored.shape) for name, source in sources
    ]
    # huggingface_hub's planner keeps the order only among tensors smaller than a shard.
    parts = [*in_groups(planned, lambda tensor: tensor.size, SHARD_BYTES)]
    source_of = dict(sources)
    done = 0

    def write(tensor: PlannedTensor, out: BinaryIO) -> None:
        nonlocal done
        _write(tensor, source_of[tensor.name], out)
        done += 1
        watch.progress("merging", done, len(planned), "tensors")

    names = _shard_names(len(parts))
    with _one_thread():
        for name, part in zip(names, parts, strict=True):
            write_tensors(to / name, part, write)
    if len(parts) > 1:
        weight_map = {tensor.name: name for name, part in zip(names, parts, strict=True) for tensor in part}
        total = sum(tensor.size for tensor in planned)
        write_json(
            to / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
    _copy_rest(base, to, target, untied)
    return sum(bool(source.adapters) for source in source_of.values())


def _plan(base: Path, adapters: list[AdapterChanges], target: Target) -> tuple[list[tuple[str, _Source]], bool]:
    """Each output tensor and its source, and whether tied weights are untied. Raises QcftError."""
    stored = stored_weights(base)
    changed = {name for adapter in adapters for name in adapter.changes}
    outside = [name for name in changed if not re.search(r"\.\d+\.", name)]  # not in a layer: embeddings, head, norm
    tied: Mapping[str, str] = {}
    if outside or not changed <= stored.keys():
        model = _without_weights(base, target)
        names = stored_names(model, base)
        for adapter in adapters:
            adapter.changes = {names.get(name, name): change for name, change in adapter.changes.items()}
        changed = {names.get(name, name) for name in changed}
        tied = {
            names.get(copy, copy): names.get(original, original) for copy, original in (of(model, TIED) or {}).items()
        }
    untied = False
    for copy, original in tied.items():
        if original in stored and changed & {copy, original}:
            stored[copy] = stored[original]
            untied = True
    missing = sorted(changed - stored.keys())
    if missing:
        raise QcftError(
            f"the adapter changes {len(missing)} weights the model lacks, such as {missing[0]}",
            "the adapter was made for another model",
        )
    for adapter in adapters:
        check_biases(adapter, stored)
        for name, change in adapter.changes.items():
            check_shape(name, change, stored[name].shape, adapter.transposed)
    quantised = _quantised(base, target) if target.dequantised else set()
    return [
        (name, _Source(one, tuple(a for a in adapters if name in a.changes), name in quantised))
        for name, one in stored.items()
    ], untied


def _write(tensor: PlannedTensor, source: _Source, out: BinaryIO) -> None:
    """Write one tensor: copied unmodified, or changed in fp32, a block of rows at a time."""
    stored = source.stored
    if not source.adapters and not source.dequantised and tensor.dtype == stored.dtype:
        for block in stored.blocks(BLOCK):
            write_bytes(block, out)
        return
    import torch

    dtype = getattr(torch, TORCH_NAMES[tensor.dtype])
    deltas = [Delta(a.changes[tensor.name], tensor.shape, a.transposed) for a in source.adapters]
    if source.dequantised:
        blocks: Iterable[torch.Tensor] = [_through_nf4(stored.read())]
    else:
        blocks = stored.blocks(None if any(delta.whole for delta in deltas) else BLOCK)
    first = 0
    held = rounded = None
    for block in blocks:
        rows = len(block)
        if held is None or rounded is None:
            held, rounded = torch.empty_like(block, dtype=torch.float32), torch.empty_like(block, dtype=dtype)
        changed = held[:rows].copy_(block)
        for delta in deltas:
            changed = delta.onto(changed, first)
        write_bytes(rounded[:rows].copy_(changed), out)
        first += rows


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: blocks are small and the disk is slower, so more threads only slow down a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _through_nf4(weight: Any) -> Any:
    """A weight quantised to NF4 as `load_model` does it, and dequantised to 16 bits."""
    import bitsandbytes.functional as bnb

    from qcft.models.load import compute_dtype, device

    place = device()
    packed, state = bnb.quantize_4bit(
        weight.to(place, compute_dtype()), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    return bnb.dequantize_4bit(packed, state).cpu()


def _quantised(base: Path, target: Target) -> set[str]:
    """The weights that transformers quantises when it loads the model in 4 bits."""
    model = _without_weights(base, target)
    names = stored_names(model, base)
    return {names.get(f"{name}.weight", f"{name}.weight") for name in quantised_modules(model)}


def _without_weights(base: Path, target: Target) -> PreTrainedModel:
    return model_without_weights(base, Model(name=str(base), trust_remote_code=target.trust_remote_code))


def _dtype(stored: str, target: Target) -> str:
    return DTYPES[target.dtype] if target.dtype and stored in FLOATS else stored


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _copy_rest(base: Path, to: Path, target: Target, untied: bool) -> None:
    """Copy config, tokenizer, chat template and generation config; a new dtype and untying are set in the config."""
    for file in base.iterdir():
        if file.is_file() and file.suffix in COPIED and "index" not in file.name and file.name != MARK:
            shutil.copyfile(file, to / file.name)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            if untied:
                part["tie_word_embeddings"] = False
            if target.dtype:
                part.pop("torch_dtype", None)
                part["dtype"] = target.dtype
    if untied or target.dtype:
        write_json(to / "config.json", config)
    if target.dequantised:
        write_json(to / MARK, {"merged_onto": "dequantised", "load": "16 bit"})
    elif (mark := read_json(base / MARK)) is not None:
        write_json(to / MARK, mark)
