"""Measuring a phase's delta at several scales."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from qcft.files import read_sealed, write_sealed
from qcft.models.adapters import combine_live, set_scale
from qcft.prepare.settings import ADDED
from qcft.steps.probe import Measuring
from qcft.steps.step import SCORES, Bench, Step
from qcft.store.metrics import DialMetrics, DialPoint

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from qcft.training.memory import Planned


@dataclass(frozen=True)
class DialPoints(Measuring[DialMetrics]):
    """Measures the phase's delta at each scale, in one load; what a killed process measured is kept."""

    kind: ClassVar[str] = "dial"
    format: ClassVar[int] = 1

    seed: int
    scales: tuple[float, ...]
    method: str | None = field(default=None, metadata=ADDED)
    density: float | None = field(default=None, metadata=ADDED)

    def do(self, step: Step, bench: Bench, folder: Path) -> DialMetrics:
        """Measure the scales that are missing."""
        model = cast("PeftModel", bench.load(step, self.quantize))
        points: list[DialPoint] = []
        for scale in self.scales:
            place = folder / f"{scale:g}"
            point = cast("DialPoint | None", read_sealed(place / "point.json"))
            if point is None:
                place.mkdir(exist_ok=True)
                if self.method and self.density is not None:
                    combine_live(model, scale, self.method, self.density, self.seed, len(step.stack))
                else:
                    set_scale(model, scale)
                measured = self.measure(cast("PreTrainedModel", model), bench, f"{step.title} at {scale:g}", place)
                point = {"scale": scale, **measured}
                write_sealed(place / "point.json", point)
            points.append(point)
        return {"points": points}

    def summary(self, metrics: DialMetrics) -> str:
        """How many scales were measured."""
        return f"{len(metrics['points'])} scales"

    def written(self, step: Step, bench: Bench, planned: Planned | None) -> int:
        """Scores and answers at each scale."""
        return SCORES * len(self.scales)
