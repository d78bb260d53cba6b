"""The measurements of each module that a freeze spec depends on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from qcft.files import write_json
from qcft.layers.change import change_since, summed_changes
from qcft.layers.snr import snr_of
from qcft.prepare.settings import ADDED
from qcft.steps.step import Bench, Step, Work
from qcft.store.metrics import LayersFile, LayersMetrics

FILE = "layers.json"
NOT_ASKED = "not asked"


@dataclass(frozen=True)
class Layers(Work[LayersMetrics]):
    """Measures the signal-to-noise ratio of each module's weights, or how much they changed: by the adapters of the
    step's parents, or `since` the model that this one was tuned from."""

    kind: ClassVar[str] = "layers"
    format: ClassVar[int] = 2  # for signal to noise: matrices without noise are ranked by their signal
    streams: ClassVar[bool] = True

    model: str
    measure: str
    since: str | None = field(default=NOT_ASKED, metadata=ADDED)  # for signal to noise

    def version(self) -> tuple[str, int]:
        """The kind and its format; the format of change is still 1."""
        return self.kind, self.format if self.measure == "snr" else 1

    def do(self, step: Step, bench: Bench, folder: Path) -> LayersMetrics:
        """Measure every module."""
        meta = bench.model.meta_model
        if self.measure == "snr":
            values = snr_of(bench.weights(step), bench.weights_digest(step), meta, bench.watch)
        elif step.parents:
            values = summed_changes(bench.adapter(parent) for parent in step.parents)
        else:
            assert bench.rows.base is not None
            values = change_since(bench.rows.base(), bench.model.folder, meta, bench.watch)
        measured: LayersFile = {"measure": self.measure, "modules": values}
        write_json(folder / FILE, measured)
        return {"measure": self.measure, "modules": len(values)}

    def summary(self, metrics: LayersMetrics) -> str:
        """How many modules were measured."""
        return f"{metrics['modules']} modules"
