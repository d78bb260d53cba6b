"""How much phase 1 changed each module: squared Frobenius norms of its delta (the paper's LF_H2)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qcft.errors import InputError
from qcft.events import Watch
from qcft.layers.snr import BLOCK_BYTES, matrix_of
from qcft.models.adapters import lora_factors
from qcft.models.tensors import tensor_files


def change_by_adapter(folder: Path) -> dict[str, float]:
    """||s B A||_F^2 of each module a LoRA adapter changes: s^2 tr((B'B)(AA')), without forming BA.

    A is (r, in) and B (out, r), so this takes products of r x r. In fp64: the trace of a product of two positive
    matrices has no cancellation, but norms of many modules are summed.
    """
    import torch

    changes = {}
    for weight, a, b, scale in lora_factors(folder):
        a, b = a.to(torch.float64), b.to(torch.float64)
        changes[weight.removesuffix(".weight")] = scale**2 * float(((b.T @ b) * (a @ a.T)).sum())
    return changes


def change_between(before: Path, after: Path, modules: Sequence[str], watch: Watch) -> dict[str, float]:
    """||W - W0||_F^2 of each module between two model folders, streamed in blocks of rows.

    Raises InputError when the two are not of one shape.
    """
    import torch

    old_files, new_files = tensor_files(before), tensor_files(after)
    changes = {}
    for done, name in enumerate(modules):
        watch.progress("change in phase 1", done, len(modules), "matrices")
        weight = f"{name}.weight"
        old, new = matrix_of(old_files, weight, before), matrix_of(new_files, weight, after)
        rows, columns = new.get_shape()
        if old.get_shape() != [rows, columns]:
            raise InputError(
                f"model.base: {str(before)!r} has {weight} of {' x '.join(map(str, old.get_shape()))}, "
                f"the model's is {rows} x {columns}",
                "give the model it was tuned from",
            )
        step = max(1, BLOCK_BYTES // (8 * columns))
        blocks = (
            new[i : i + step].to(torch.float64) - old[i : i + step].to(torch.float64) for i in range(0, rows, step)
        )
        changes[name] = sum(float((block**2).sum()) for block in blocks)
    watch.progress("change in phase 1", len(modules), len(modules), "matrices")
    return changes
