"""What a freeze spec goes by, measured module by module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcft.files import write_json
from qcft.layers.change import change_since, summed_changes
from qcft.layers.snr import snr_of
from qcft.steps.base import StepWork
from qcft.steps.step import Step


class LayersWork(StepWork):
    """Does the `layers` steps."""

    def work(self, step: Step, folder: Path) -> dict[str, Any]:
        """Measure what a freeze spec goes by, module by module."""
        prepared = self.prepared
        measure = step.settings["measure"]
        if measure == "snr":
            values = snr_of(self.weights(step), self.weights_digest(step), prepared.meta_model, self.watch)
        elif step.parents:
            values = summed_changes(self.adapter(parent) for parent in step.parents)
        else:
            values = change_since(prepared.base_folder, prepared.folder, prepared.meta_model, self.watch)
        write_json(folder / "layers.json", {"measure": measure, "modules": values})
        return {"measure": measure, "modules": len(values)}
