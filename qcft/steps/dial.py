"""Measuring a phase's delta at several scales."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qcft.files import read_sealed, write_sealed
from qcft.models.adapters import combine_live, set_scale
from qcft.steps.probe import ProbeWork
from qcft.steps.step import Step

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class DialWork(ProbeWork):
    """Does the `dial` steps."""

    def work(self, step: Step, folder: Path) -> dict[str, Any]:
        """Measure the phase's delta at each scale, in one load; what a killed process measured is kept."""
        model = cast("PeftModel", self.load(step, quantize=step.settings["quantize"]))
        settings, points = step.settings, []
        for scale in settings["scales"]:
            place = folder / f"{scale:g}"
            point = read_sealed(place / "point.json")
            if point is None:
                place.mkdir(exist_ok=True)
                if settings.get("method"):
                    combine_live(
                        model, scale, settings["method"], settings["density"], settings["seed"], len(step.under) + 1
                    )
                else:
                    set_scale(model, scale)
                measured = self.measure(cast("PreTrainedModel", model), step, f"{step.title} at {scale:g}", place)
                point = {"scale": scale, **measured}
                write_sealed(place / "point.json", point)
            points.append(point)
        return {"points": points}
