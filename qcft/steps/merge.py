"""Merging adapters onto the 16-bit weights they were trained on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from qcft.models.adapters import combine_live, load_stack
from qcft.models.chat import write_chat
from qcft.models.load import load_model
from qcft.models.merge import Target, merge_adapters
from qcft.steps.base import StepWork
from qcft.steps.step import Step


class MergeWork(StepWork):
    """Does the `merge` steps."""

    def work(self, step: Step, folder: Path) -> dict[str, Any]:
        """Merge an adapter onto the 16-bit weights it was trained on."""
        assert step.adapter is not None
        work, done = folder / "model.partial", folder / "model"
        for place in (work, done):
            shutil.rmtree(place, ignore_errors=True)
        work.mkdir()
        settings = step.settings
        target = Target(
            settings.get("dtype"), settings.get("base") == "dequantised", self.recipe.model.trust_remote_code
        )
        stack: list[Path | tuple[Path, float]] = [*map(self.adapter, step.under)]
        stack.append((self.adapter(step.adapter), settings.get("scale", 1.0)))
        if settings.get("method"):
            stack = [self._combined(step, folder)]
        changed = merge_adapters(self.weights(step), stack, work, self.watch, target)
        write_chat(self.prepared.tokenizer, work)
        work.rename(done)
        return {"merged_weights": changed}

    def _combined(self, step: Step, folder: Path) -> Path:
        """The stack's adapters combined by one of PEFT's methods, saved in the step."""
        settings = step.settings
        model = load_stack(
            load_model(self.weights(step), self.recipe.model),
            [self.adapter(one) for one in (*step.under, step.adapter or "")],
        )
        name = combine_live(
            model, settings["scale"], settings["method"], settings["density"], self.recipe.seed, len(step.under) + 1
        )
        model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
        return folder / name
