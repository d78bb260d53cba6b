"""Taking in an adapter made elsewhere, as a phase."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from qcft.errors import ChangedInput
from qcft.models.adapter_config import CONFIG, WEIGHTS
from qcft.prepare.prepared import adapter_digest
from qcft.steps.base import StepWork
from qcft.steps.step import Step


class AdapterWork(StepWork):
    """Does the `adapter` steps."""

    def work(self, step: Step, folder: Path) -> dict[str, Any]:
        """Copy an adapter made elsewhere into the step."""
        phase = self.phase(step)
        assert phase.adapter is not None
        (folder / "adapter").mkdir(exist_ok=True)
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(Path(os.path.expanduser(phase.adapter)) / name, folder / "adapter" / name)
        if adapter_digest(folder / "adapter") != step.settings["rows"]:
            raise ChangedInput(
                f"adapter: {phase.adapter!r} changed while it was in use",
                "give the same command again to start from the adapter as it is now",
            )
        return {"adapter": phase.adapter}
