"""The speed of this machine, in computing and in memory access, measured in under a second."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from qcft.models.load import compute_dtype, device
from qcft.training.footprint import Footprint

SECONDS = 0.3  # duration of each measurement


@dataclass(frozen=True)
class Speed:
    """`flops`: of matrix products in 16 bits, per second; `moved`: bytes read and written per second."""

    flops: float
    moved: float

    def seconds(self, cost: Footprint) -> float:
        """The time of a pass if its matrix products and its other operations run one after the other."""
        return cost.flops / self.flops + cost.moved / self.moved


def measure_speed() -> Speed:
    """Time matrix products and copies of sizes that are typical of a training."""
    import torch

    rows, width = 512, 1024
    a = torch.ones(rows, width, dtype=compute_dtype(), device=device())
    b = torch.ones(width, width, dtype=compute_dtype(), device=device())
    numbers = torch.ones(1 << 23, dtype=compute_dtype(), device=device())
    return Speed(
        flops=per_second(lambda: a @ b) * 2 * rows * width * width,
        moved=per_second(lambda: numbers * 2) * 2 * numbers.numel() * numbers.element_size(),
    )


def per_second(work: Callable[[], object]) -> float:
    """How often `work` runs per second, after a warm-up; in batches that double in size, so that waiting for the card
    between them hardly counts."""
    import torch

    def wait() -> None:
        if device() == "cuda":
            torch.cuda.synchronize()

    work()
    wait()
    done, at_once, begun = 0, 1, time.perf_counter()
    while (spent := time.perf_counter() - begun) < SECONDS:
        for _ in range(at_once):
            work()
        wait()
        done, at_once = done + at_once, 2 * at_once
    return done / spent
