"""Merging adapters onto the 16-bit weights they were trained on."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypedDict

from qcft.layers import scales_by_layer
from qcft.models.adapters import combine_live
from qcft.models.chat import write_chat
from qcft.models.deltas import Scale
from qcft.models.merge import Target, merge_adapters
from qcft.prepare.settings import ADDED, SPREAD, ModelSettings
from qcft.recipe import parse_by_layer
from qcft.steps.step import Bench, Step, Work
from qcft.words import counted

if TYPE_CHECKING:
    from peft import PeftModel

    from qcft.training.memory import Planned


class MergeMetrics(TypedDict):
    """How many weights the adapters changed."""

    merged_weights: int


@dataclass(frozen=True)
class Merge(Work[MergeMetrics]):
    """Merges the step's adapter, and those under it, onto 16-bit weights: unscaled, at a scale, scaled `by` layer, or
    combined by one of PEFT's methods, which use `seed`."""

    kind: ClassVar[str] = "merge"
    streams: ClassVar[bool] = True

    model: ModelSettings = field(metadata=SPREAD)
    dtype: str | None = field(default=None, metadata=ADDED)
    base: Literal["dequantised"] | None = field(default=None, metadata=ADDED)
    scale: float = field(default=1.0, metadata=ADDED)
    method: str | None = field(default=None, metadata=ADDED)
    density: float | None = field(default=None, metadata=ADDED)
    seed: int = field(default=0, metadata=ADDED)
    by: str | None = field(default=None, metadata=ADDED)

    def do(self, step: Step, bench: Bench, folder: Path) -> MergeMetrics:
        """Merge into `folder/model`."""
        work, done = folder / "model.partial", folder / "model"
        for place in (work, done):
            shutil.rmtree(place, ignore_errors=True)
        work.mkdir()
        target = Target(self.dtype, self.base == "dequantised", bench.model.asked.trust_remote_code)
        if self.method:
            stack: list[Path | tuple[Path, Scale]] = [self._combined(step, bench, folder)]
        else:
            *under, top = map(bench.adapter, step.stack)
            by = parse_by_layer(self.by) if self.by else None
            stack = [*under, (top, scales_by_layer(bench.model.meta_model, by) if by else self.scale)]
        changed = merge_adapters(bench.weights(step), stack, work, bench.watch, target)
        write_chat(bench.model.tokenizer, work)
        work.rename(done)
        return {"merged_weights": changed}

    def summary(self, metrics: MergeMetrics) -> str:
        """How many weights were changed."""
        return f"{counted(metrics['merged_weights'], 'weight')} changed"

    def written(self, step: Step, bench: Bench, planned: Planned | None) -> int:
        """The model in 16 bits."""
        parameters: int = sum(p.numel() for p in bench.model.meta_model.parameters())
        return 2 * parameters

    def _combined(self, step: Step, bench: Bench, folder: Path) -> Path:
        """The stack's adapters combined by one of PEFT's methods, saved in the step."""
        assert self.method is not None
        assert self.density is not None
        model: PeftModel = bench.load(step)
        name = combine_live(model, self.scale, self.method, self.density, self.seed, len(step.stack))
        model.save_pretrained(str(folder), selected_adapters=[name], save_embedding_layers=False)
        return folder / name
