"""Merging a LoRA adapter onto the original 16-bit weights, tensor by tensor.

Never into 4-bit weights and never onto a dequantised base: once the result is back in 4 bits, both lose
nearly all that the adapter learned.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.errors import QcftError
from qcft.events import Watch
from qcft.files import read_json
from qcft.models.adapters import CONFIG, WEIGHTS, adapted_shapes, check_mergeable, factor_names

if TYPE_CHECKING:
    import torch

SHARD_BYTES = 10**9


def merge_adapter(base: Path, adapter: Path, to: Path, watch: Watch) -> int:
    """Write base + adapter as a model folder: W + s B A, added in fp32, kept in the base's dtype.

    Tensors are read one at a time and written in shards of at most 1 GB. Returns the number of weights
    that were changed. Raises QcftError when the adapter does not fit the base.
    """
    from safetensors.torch import save_file

    deltas = _Deltas(adapter)
    weight_map: dict[str, str] = {}
    shards: list[Path] = []
    total = 0
    shard: dict[str, torch.Tensor] = {}
    held = 0

    def write() -> None:
        nonlocal shard, held
        path = to / f"part-{len(shards) + 1:05d}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        shards.append(path)
        weight_map.update(dict.fromkeys(shard, path.name))
        shard, held = {}, 0

    names = len(weight_names(base))
    for done, (name, tensor) in enumerate(_tensors(base), start=1):
        merged = deltas.add_to(name, tensor)
        size = merged.numel() * merged.element_size()
        if shard and held + size > SHARD_BYTES:
            write()
        shard[name] = merged
        held += size
        total += size
        watch.progress("merging", done, names, "tensors")
    write()
    deltas.check_all_used()
    _name_shards(to, shards, weight_map, total)
    for file in base.iterdir():
        if file.is_file() and file.suffix in {".json", ".jinja", ".model", ".txt", ".py"} and "index" not in file.name:
            shutil.copyfile(file, to / file.name)
    return deltas.used


class _Deltas:
    """An adapter's factors, by the name of the weight they change."""

    def __init__(self, adapter: Path) -> None:
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        check_mergeable(config, str(adapter))
        self.alpha = float(config["lora_alpha"])
        self.rslora = bool(config.get("use_rslora"))
        self.file = _open(adapter / WEIGHTS)
        self.shapes = adapted_shapes(adapter)
        self.used = 0

    def add_to(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight with its delta, or as it is where the adapter has none for it."""
        shape = self.shapes.pop(name, None)
        if shape is None:
            return weight
        import torch

        if shape != tuple(weight.shape):
            raise QcftError(
                f"the adapter's delta for {name} is {shape[0]} x {shape[1]}, the weight {tuple(weight.shape)}",
                "the adapter was made for another model",
            )
        a, b = (self._factor(factor) for factor in factor_names(name))
        scale = self.alpha / (math.sqrt(len(a)) if self.rslora else len(a))
        self.used += 1
        return (weight.to(torch.float32) + scale * (b @ a)).to(weight.dtype)

    def _factor(self, name: str) -> torch.Tensor:
        import torch

        factor: torch.Tensor = self.file.get_tensor(name)
        return factor.to(torch.float32)

    def check_all_used(self) -> None:
        if self.shapes:
            raise QcftError(
                f"the adapter changes {len(self.shapes)} weights the model lacks, such as {next(iter(self.shapes))}",
                "the adapter was made for another model",
            )


def _open(file: Path) -> Any:
    from safetensors import safe_open

    return safe_open(file, framework="pt")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files a model folder is loaded from: those of its index, else model.safetensors, else all."""
    index = read_json(folder / "model.safetensors.index.json")
    if isinstance(index, dict):
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def tensor_files(folder: Path) -> dict[str, Any]:
    """The open safetensors file of each weight in a model folder, by the name it is stored under."""
    opened = [_open(file) for file in weight_files(folder)]
    return {name: tensors for tensors in opened for name in tensors.keys()}  # noqa: SIM118 (safe_open is no mapping)


def weight_names(folder: Path) -> set[str]:
    """The names of the weights in a model folder, as they are stored."""
    return set(tensor_files(folder))


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in weight_files(folder):
        with _open(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                yield name, tensors.get_tensor(name)


def _name_shards(to: Path, shards: list[Path], weight_map: dict[str, str], total: int) -> None:
    """Give the shards the names transformers looks for, with an index when there are several."""
    if len(shards) == 1:
        shards[0].rename(to / "model.safetensors")
        return
    final = {p.name: f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i, p in enumerate(shards, start=1)}
    for path in shards:
        path.rename(to / final[path.name])
    index = {"metadata": {"total_size": total}, "weight_map": {k: final[v] for k, v in sorted(weight_map.items())}}
    (to / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
