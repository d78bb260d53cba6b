"""Deterministic kernels, if the recipe asks for them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from qcft.errors import QcftError, short


def prepare_cublas() -> None:
    """Set the variable that makes cuBLAS deterministic, unless the user has set it; CUDA reads it at its start."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic(asked: bool) -> Iterator[None]:
    """Use PyTorch's deterministic kernels if `asked`. Raises QcftError for an operation that has none."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    if asked:
        torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if not asked or "deterministic" not in str(error):
            raise
        raise QcftError(f"deterministic: {short(error)}", "--set deterministic=false trains without it") from None
    finally:
        torch.use_deterministic_algorithms(before)
