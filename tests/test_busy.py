"""Other work on the machine is noticed before and while a training is slow."""

import psutil
import pytest
import torch

from qcft.events import Note, Progress, Watch
from qcft.runner import busy


@pytest.fixture
def notes():
    return []


@pytest.fixture
def watch(notes):
    return Watch(lambda event: notes.append(event.text) if isinstance(event, Note) else None)


@pytest.mark.parametrize(
    ("load", "used", "threads", "warned"),
    [(7.5, 90, 2, True), (1.5, 90, 2, False), (7.5, 90, 1, False), (7.5, 5, 2, False)],  # the last: what was before
)
def test_a_busy_machine(watch, notes, monkeypatch, load, used, threads, warned):
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds: used)
    monkeypatch.setattr(psutil, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for _ in range(2):
        busy.warn_if_busy(watch)
    assert len(notes) == warned, "once at most"
    assert all(
        "use 90% of this machine's CPUs (load 7.5 on 2 cores)" in line and "OMP_NUM_THREADS=1" in line for line in notes
    )


@pytest.mark.parametrize(("estimated", "seconds", "warned"), [(100, 500, True), (100, 300, False), (None, 500, False)])
def test_a_training_that_takes_several_times_what_was_estimated(watch, notes, monkeypatch, estimated, seconds, warned):
    clock = iter(range(0, 100 * seconds, seconds // 2))  # seconds / 2 for each half of the training
    monkeypatch.setattr(busy.time, "monotonic", lambda: next(clock))
    with busy.warning_if_slow(watch, estimated):
        watch.emit(Progress("generating replay", 1, 1, "answers"))
        for done in (1, 2):
            watch.emit(Progress("training phase2", done, 2, "steps"))
    assert notes == ["training phase2 takes 5 times as long as estimated; if other programs keep this machine busy, "
                     + busy.FEWER] * warned  # fmt: skip
    watch.emit(Progress("training phase2", 2, 2, "steps"))
