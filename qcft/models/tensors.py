"""Weights on disk, one tensor at a time: finding and reading each in a safetensors file, and writing such a file.

The safetensors library needs all tensors of a file in memory to write it, and maps the file it reads, which counts as
resident memory. A merge writes shards of a gigabyte but needs only one block of rows in memory. The format is simple (a
length, a JSON header and the bytes), so it is read and written here.
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from qcft.files import read_json

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "U64": "uint64", "U32": "uint32", "U16": "uint16",
}  # fmt: skip
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: its dtype as the format names it, its shape, and where its bytes are."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own (a mapped file would count as resident while it is open)."""
        return next(self.blocks(None)).reshape(self.shape)

    def blocks(self, most: int | None) -> Iterator[torch.Tensor]:
        """The tensor's rows, of all its matrices (a bias is one row), at most about `most` numbers at once (None: all).

        A block is valid until the next one is read.
        """
        import torch

        dtype = getattr(torch, TORCH_NAMES[self.dtype])
        rows, columns = math.prod(self.shape[:-1]), self.shape[-1] if self.shape else 1
        step = rows if most is None else min(rows, max(1, most // max(1, columns)))
        if not self.size:
            yield torch.empty((rows, columns), dtype=dtype)
            return
        width = self.size // rows
        data = torch.empty(step * width, dtype=torch.uint8)
        view = data.numpy().data.cast("B")
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.begin)
            for first in range(0, rows, step):
                count = min(step, rows - first)
                _read_into(stream, view[: count * width])
                yield data[: count * width].view(dtype).reshape(count, columns)


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in the order of their bytes."""
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            found[name] = StoredTensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
    return dict(sorted(found.items(), key=lambda item: item[1].begin))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files with a model folder's weights: model.safetensors, else those of its index, like
    transformers; in a folder that is not a model, all safetensors files."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = read_json(folder / INDEX)
    if isinstance(index, dict):
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def stored_weights(folder: Path) -> dict[str, StoredTensor]:
    """A model folder's weights by their stored names."""
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        found |= stored_tensors(file)
    return found


def tensor_files(folder: Path) -> dict[str, Any]:
    """The open safetensors file of each weight in a model folder, by the name it is stored under."""
    from safetensors import safe_open

    opened: list[Any] = [safe_open(file, framework="pt") for file in weight_files(folder)]
    return {name: tensors for tensors in opened for name in tensors.keys()}  # noqa: SIM118 (safe_open is not a mapping)


def write_tensors(
    file: Path, tensors: Sequence[PlannedTensor], write: Callable[[PlannedTensor, BinaryIO], None]
) -> None:
    """Write a safetensors file; `write(tensor, stream)` is called for each tensor in turn and writes its bytes.

    Wider dtypes come first, as in the safetensors library, so that every tensor is aligned.
    """
    ordered = sorted(tensors, key=lambda t: -ITEM_BYTES[t.dtype])  # stable: tensors of one width keep their order
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [place, place + tensor.size],
        }
        place += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered:
            write(tensor, out)
        if out.tell() != 8 + len(text) + place:
            raise ValueError(f"{file.name}: its tensors do not have the planned size")


def write_bytes(tensor: torch.Tensor, out: BinaryIO) -> None:
    """Write a tensor's bytes without copying the tensor."""
    import torch

    out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _read_into(stream: io.FileIO, part: memoryview) -> None:
    done = 0
    while done < len(part):
        count = stream.readinto(part[done:])
        if not count:
            raise OSError("a safetensors file ended too early")
        done += count
