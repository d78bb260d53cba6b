"""Signal-to-noise ratios of weight matrices, as Spectrum ranks them (Hartford et al. 2024, arXiv 2406.06623)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.cache import cached_folder
from qcft.errors import InputError
from qcft.events import Watch
from qcft.files import read_json, write_json
from qcft.layers.modules import linear_modules
from qcft.models.names import stored_names
from qcft.models.tensors import tensor_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BLOCK_BYTES = 2**26  # of a matrix, in fp64, held at once
SNR_FORMAT = 2  # raised when the way the ratio is computed changes
NO_NOISE = 1e-300  # stands for the noise of a matrix without any: its ratio is above every other, and finite


def signal_to_noise(singular: torch.Tensor, rows: int, columns: int) -> float:
    """The ratio of a matrix's signal to its noise, over its largest singular value.

    Signal is the sum of the singular values above the Marchenko-Pastur edge sigma (1 + sqrt(beta)), noise the sum
    of the others; beta is the shorter side over the longer, sigma the interquartile range of the singular values
    over 1.349, that of a normal distribution (section 3 of the paper). `singular` is of shape (min(rows, columns),)
    in any order. A matrix of zeros has the ratio 0. One without noise has its signal over NO_NOISE in place of noise:
    such matrices come before all others, and among themselves in the order of their signal over their largest singular
    value. That is the order Spectrum's code gives them (noise 1 where there is none, commit 0ed1756).
    """
    import torch

    largest = float(singular.max())
    if largest == 0:
        return 0.0
    low, high = torch.quantile(singular, torch.tensor([0.25, 0.75], dtype=singular.dtype)).tolist()
    edge = (high - low) / 1.349 * (1 + math.sqrt(min(rows, columns) / max(rows, columns)))
    signal, noise = float(singular[singular > edge].sum()), float(singular[singular <= edge].sum())
    return signal / noise / largest if noise else signal / largest / NO_NOISE


def singular_values(matrix: Any, rows: int, columns: int) -> torch.Tensor:
    """The singular values of a matrix, in fp64, from the eigenvalues of its Gram matrix on the shorter side.

    `matrix` is sliced like a tensor and read block by block, so a tensor on disk is never fully in memory.
    """
    import torch

    side, long = min(rows, columns), max(rows, columns)
    gram = torch.zeros(side, side, dtype=torch.float64)
    step = max(1, BLOCK_BYTES // (8 * side))
    for begin in range(0, long, step):
        if rows >= columns:
            block = matrix[begin : begin + step].to(torch.float64)
        else:
            block = matrix[:, begin : begin + step].to(torch.float64).T
        gram.addmm_(block.T, block)
    squares: torch.Tensor = torch.linalg.eigvalsh(gram)
    return squares.clamp(min=0).sqrt()


def measure_snr(folder: Path, model: PreTrainedModel, modules: Sequence[str], watch: Watch) -> dict[str, float]:
    """The ratio of each linear module of a model folder, read from its safetensors one matrix at a time.

    Raises InputError for a module whose weight is missing.
    """
    files = module_files(folder, model)
    ratios = {}
    for done, name in enumerate(modules):
        watch.progress("signal to noise", done, len(modules), "matrices")
        matrix = matrix_of(files, name, folder)
        rows, columns = matrix.get_shape()
        ratios[name] = signal_to_noise(singular_values(matrix, rows, columns), rows, columns)
    watch.progress("signal to noise", len(modules), len(modules), "matrices")
    return ratios


def module_files(folder: Path, model: PreTrainedModel) -> dict[str, tuple[Any, str]]:
    """For each weight of a model the open file that holds it and its name there, by its name in the model."""
    files = tensor_files(folder)
    return {live: (files[stored], stored) for live, stored in stored_names(model, folder).items()}


def matrix_of(files: dict[str, tuple[Any, str]], module: str, folder: Path) -> Any:
    """A module's weight on disk, to be sliced. Raises InputError when it is missing."""
    if f"{module}.weight" not in files:
        raise InputError(
            f"model: {str(folder)!r} holds no weight of its own for {module}",
            "use a freeze spec that needs no measurement, such as freeze: layers:0-11 or first:0.5",
        )
    file, stored = files[f"{module}.weight"]
    return file.get_slice(stored)


def snr_of(folder: Path, digest: str, model: PreTrainedModel, watch: Watch) -> dict[str, float]:
    """The signal-to-noise ratio of each linear module, cached by the digest of the weights."""
    names = [module.name for module in linear_modules(model)]

    def make(work: Path) -> None:
        write_json(work / "snr.json", measure_snr(folder, model, names, watch))

    key = hashlib.sha256(f"{digest} {names}".encode()).hexdigest()[:20]
    return dict(read_json(cached_folder(f"snr/{key}-v{SNR_FORMAT}", make, watch) / "snr.json"))
