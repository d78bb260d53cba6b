"""Measuring a phase's delta at several scales, and scaled by layer."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from qcft.errors import InputError
from qcft.files import read_sealed, write_sealed
from qcft.layers import scales_by_layer
from qcft.models.adapters import combine_live, set_scale
from qcft.prepare.settings import ADDED
from qcft.recipe import ByLayer, parse_by_layer
from qcft.recipe.stages import point_folder
from qcft.steps.probe import Measuring
from qcft.steps.step import SCORES, Bench, Step
from qcft.store.metrics import DeltaAmount, DialMetrics, DialPoint
from qcft.words import counted

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from qcft.store.opened import DoneStep, StepInputs
    from qcft.training.memory import Planned

POINT = "point.json"


@dataclass(frozen=True)
class DialPoints(Measuring[DialMetrics]):
    """Measures the phase's delta at each scale, and scaled by layer for each spec in `by`, with one load of the model.

    Points that a killed process measured are kept, and points of another dial of the run on the same delta are copied.
    """

    kind: ClassVar[str] = "dial"
    format: ClassVar[int] = 1

    seed: int
    scales: tuple[float, ...]
    method: str | None = field(default=None, metadata=ADDED)
    density: float | None = field(default=None, metadata=ADDED)
    by: tuple[str, ...] = field(default=(), metadata=ADDED)

    def do(self, step: Step, bench: Bench, folder: Path) -> DialMetrics:
        """Measure the points that are missing."""
        earlier = _earlier(step, bench)
        points: list[DialPoint] = []
        load = cache(lambda: cast("PeftModel", bench.load(step, self.quantize)))
        amounts: list[float | ByLayer] = [*self.scales, *map(parse_by_layer, self.by)]
        for amount in amounts:
            place = folder / point_folder(amount)
            point = _read(place) or _copied(earlier, place)
            if point is None:
                place.mkdir(exist_ok=True)
                self._apply(load(), amount, step, bench)
                taken: DeltaAmount = {"by": str(amount)} if isinstance(amount, ByLayer) else {"scale": amount}
                at = amount.label if isinstance(amount, ByLayer) else f"{amount:g}"
                measured = self.measure(cast("PreTrainedModel", load()), bench, f"{step.title} at {at}", place)
                point = {**taken, **measured}
                write_sealed(place / POINT, point)
            points.append(point)
        return {"points": points}

    def summary(self, metrics: DialMetrics) -> str:
        """How many scales were measured, and how many patterns of layers."""
        by_layer = len(self.by)
        return counted(len(metrics["points"]) - by_layer, "scale") + (f", {by_layer} by layers" if by_layer else "")

    def written(self, step: Step, bench: Bench, planned: Planned | None) -> int:
        """Scores and answers at each point."""
        return SCORES * (len(self.scales) + len(self.by))

    def _apply(self, model: PeftModel, amount: float | ByLayer, step: Step, bench: Bench) -> None:
        """Scale the model's delta by this amount."""
        if isinstance(amount, ByLayer):
            set_scale(model, scales_by_layer(bench.model.meta_model, amount))
        elif self.method and self.density is not None:
            combine_live(model, amount, self.method, self.density, self.seed, len(step.stack))
        else:
            set_scale(model, amount)


def _earlier(step: Step, bench: Bench) -> list[DoneStep]:
    """The run's other dials that measured the same delta in the same way, at any points."""
    similar = (s for s in bench.steps.values() if s.kind == step.kind and s.id != step.id and _way(s) == _way(step))
    return [done for one in similar if (done := bench.store.open(one.id))]


def _way(step: Step) -> StepInputs:
    inputs = step.inputs()
    points = {"scales", "by"}
    return {**inputs, "settings": {key: value for key, value in inputs["settings"].items() if key not in points}}


def _copied(earlier: Sequence[DoneStep], place: Path) -> DialPoint | None:
    """Copy a point that an earlier dial measured, with its files; None if there is no complete one."""
    for one in earlier:
        if one.has(f"{place.name}/{POINT}"):
            try:
                found = one.part(place.name)
            except InputError:  # altered: measured again
                continue
            shutil.copytree(found, place, ignore=shutil.ignore_patterns(POINT), dirs_exist_ok=True)
            shutil.copyfile(found / POINT, place / POINT)  # last, as it shows that the others are complete
            return _read(place)
    return None


def _read(place: Path) -> DialPoint | None:
    return cast("DialPoint | None", read_sealed(place / POINT))
