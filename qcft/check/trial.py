"""The speed of a training, from a few real optimizer steps in a temporary folder."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from qcft.events import Event, Progress, Watch
from qcft.recipe import Phase, Recipe, recipe_from
from qcft.runner.recipe import run_recipe

WARM_UP, COUNTED = 1, 2  # optimizer steps


def seconds_a_step(recipe: Recipe, phase: Phase, watch: Watch) -> float:
    """Seconds that an optimizer step of a phase takes, after a first one.

    The phase is trained from the unmodified model, without replay, otherwise as in a run; a freeze spec that depends
    on measurements, which are not made here, freezes nothing.
    """
    raw = recipe.model_dump(mode="json")
    one = next(p for p in raw["phases"] if p["name"] == phase.name)
    train = {**one["train"], "steps": WARM_UP + COUNTED, "checkpoint_steps": 100}
    freeze = one["freeze"] if phase.freeze.measure is None else "none"
    raw["phases"] = [{**one, "replay": None, "start": "merged", "freeze": freeze, "train": train}]
    raw["evaluate"] = {}  # it may name stages of other phases
    times: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, Progress):
            watch.progress(event.label, event.done, event.total, event.unit, **event.stats)
            if event.label == f"training {phase.name}":
                times.append(time.monotonic())

    with tempfile.TemporaryDirectory(prefix="qcft-") as place:
        run_recipe(recipe_from(raw), Path(place), Watch(listen), up_to=phase.name)
    return (times[-1] - times[0]) / (len(times) - 1)
