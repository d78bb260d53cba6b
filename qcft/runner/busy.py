"""Detects other work on the machine, which makes training on its CPUs 10 to 80 times slower.

OpenMP's threads wait by spinning, and one that is not scheduled delays all others at every operation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from qcft.events import Event, Progress, Watch

SLOWER = 4  # times the estimate: more than the error of an estimate
PATIENCE = 60  # seconds
LOOK = 0.3  # seconds
BUSY = 0.4  # share of all CPUs that others use while this process waits
FEWER = "OMP_NUM_THREADS=1 before the command (or as many threads as cores are idle) avoids most of it"


@cache  # once, not for each arm of an ablation
def warn_if_busy(watch: Watch) -> None:
    """Warn where other programs use most of the CPUs."""
    import psutil
    import torch

    from qcft.models.load import device

    load, cores = psutil.getloadavg()[0], psutil.cpu_count() or 1
    if device() != "cpu" or torch.get_num_threads() == 1 or load <= cores:
        return
    # The load is a mean over a minute, which may include loading this process's libraries, or an earlier run.
    used = psutil.cpu_percent(LOOK) / 100
    if used > BUSY:
        watch.note(
            f"other programs use {used:.0%} of this machine's CPUs (load {load:.1f} on {cores} cores), which can make "
            f"training many times slower; {FEWER}",
            "warning",
        )


@contextmanager
def warning_if_slow(watch: Watch, estimated: float | None) -> Iterator[None]:
    """Warn once where a training takes several times the `estimated` seconds, as its progress shows."""
    begun, warned = time.monotonic(), False

    def check(event: Event) -> None:
        nonlocal warned
        if warned or not estimated or not isinstance(event, Progress) or not event.label.startswith("training "):
            return
        spent, due = time.monotonic() - begun, estimated * event.done / event.total
        if spent > PATIENCE + SLOWER * due:
            warned = True
            watch.note(
                f"{event.label} takes {spent / due:.0f} times as long as estimated; if other programs keep this "
                f"machine busy, {FEWER}",
                "warning",
            )

    with watch.listening(check):
        yield
