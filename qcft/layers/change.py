"""How much phase 1 changed each module: squared Frobenius norms of its delta (the paper's LF_H2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qcft.errors import InputError
from qcft.events import Watch
from qcft.layers.modules import linear_modules
from qcft.layers.snr import BLOCK_BYTES, matrix_of, module_files
from qcft.models.adapters import lora_factors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def change_by_adapter(folder: Path) -> dict[str, float]:
    """||s B A||_F^2 of each module a LoRA adapter changes."""
    return {
        weight.removesuffix(".weight"): squared_norm([(a, b, scale)]) for weight, a, b, scale in lora_factors(folder)
    }


def squared_norm(factors: Sequence[tuple[torch.Tensor, torch.Tensor, float]]) -> float:
    """||sum_i s_i B_i A_i||_F^2 of factors A (r, in), B (out, r) and scales: tr((B'B)(AA')) of the concatenated A's
    and B's, without forming any BA.

    Needs products of r x r, r the sum of the ranks. In fp64: where signs differ the traces cancel, which leaves an
    error of about 1e-16 of the largest ||s_i B_i A_i||_F^2.
    """
    import torch

    a = torch.cat([a.to(torch.float64) for a, _, _ in factors])
    b = torch.cat([scale * b.to(torch.float64) for _, b, scale in factors], dim=1)
    return max(0.0, float(((b.T @ b) * (a @ a.T)).sum()))


def change_between(
    before: Path,
    after: Path,
    model: PreTrainedModel,
    modules: Sequence[str],
    watch: Watch,
    label: str = "change in phase 1",
) -> dict[str, float]:
    """||W - W0||_F^2 of each module between two folders of one model, streamed in blocks of rows.

    Raises InputError when the two differ in shape.
    """
    import torch

    old_files, new_files = module_files(before, model), module_files(after, model)
    changes = {}
    for done, name in enumerate(modules):
        watch.progress(label, done, len(modules), "matrices")
        old, new = matrix_of(old_files, name, before), matrix_of(new_files, name, after)
        rows, columns = new.get_shape()
        if old.get_shape() != [rows, columns]:
            raise InputError(
                f"model.base: {str(before)!r} has {name}.weight of {' x '.join(map(str, old.get_shape()))}, "
                f"the model's is {rows} x {columns}",
                "give the model it was tuned from",
            )
        step = max(1, BLOCK_BYTES // (8 * columns))
        blocks = (
            new[i : i + step].to(torch.float64) - old[i : i + step].to(torch.float64) for i in range(0, rows, step)
        )
        changes[name] = sum(float((block**2).sum()) for block in blocks)
    watch.progress(label, len(modules), len(modules), "matrices")
    return changes


def summed_changes(adapters: Iterable[Path]) -> dict[str, float]:
    """How much adapters changed each module: the sum of their squared Frobenius norms."""
    total: dict[str, float] = {}
    for adapter in adapters:
        for name, change in change_by_adapter(adapter).items():
            total[name] = total.get(name, 0.0) + change
    return total


def change_since(base: Path, folder: Path, model: PreTrainedModel, watch: Watch) -> dict[str, float]:
    """How much each linear module differs from that of the model's base."""
    return change_between(base, folder, model, [module.name for module in linear_modules(model)], watch)
