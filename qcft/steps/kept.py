"""What merging kept of what a phase learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qcft.errors import QcftError
from qcft.events import Watch
from qcft.measure.distance import compare, predictions
from qcft.measure.score import read_scores
from qcft.measure.stats import kept
from qcft.models.load import free_memory
from qcft.recipe import Merge
from qcft.replay.pools import ENGLISH
from qcft.steps.base import StepWork
from qcft.steps.step import Step


class KeptWork(StepWork):
    """Does the `kept` steps."""

    def work(self, step: Step, folder: Path) -> dict[str, Any]:
        """Compare base, live adapters and merged model on the held-out rows of the phases they hold."""
        base, live, merged = (read_scores(self.store.opened(parent)) for parent in step.parents)
        groups = self.prepared.groups
        # An adapter made elsewhere has no rows of its own here: English stands for them.
        phases = step.settings["phases"]
        own = [g for g in groups if g.phase in phases] or [g for g in groups if g.lang == ENGLISH]
        a, b, c = ([s for g in own for s in scores[g.name]] for scores in (base, live, merged))
        rows = [row for group in own for row in self.prepared.held_out(group).encoded]
        live_step, merged_step = (self.steps[parent] for parent in step.parents[1:])
        seen = predictions(self.load(live_step), rows, self.watch, f"{step.title}: live")
        free_memory()
        model = self.load(merged_step, quantize=merged_step.settings["quantize"])
        distance = compare(model, rows, seen, self.watch, f"{step.title}: merged")
        return {"groups": [g.name for g in own], **asdict(kept(a, b, c)), **asdict(distance)}


def judge_merge(step: Step, metrics: Mapping[str, Any], limits: Merge, watch: Watch) -> None:
    """Warn or refuse when merging lost what the phase learned."""
    far = None
    if limits.max_kl is not None and metrics["kl"] > limits.max_kl:
        far = f"KL {metrics['kl']:.3g} nats per answer token from the live adapter, over {limits.max_kl:g}"
    if limits.min_agreement is not None and metrics["agreement"] < limits.min_agreement:
        far = f"greedy agreement {metrics['agreement']:.1%} with the live adapter, under {limits.min_agreement:.1%}"
    if far:
        raise QcftError(f"merging {step.phase}: {far}", "start the next phase stacked, which is exact")
    share = metrics["share"]
    if share is None:
        if metrics["worse"]:
            loss = metrics["loss"]["value"]
            watch.note(f"merging {step.phase} made its held-out rows {loss:.3f} nats worse", "warning")
    elif limits.refuse_below is not None and share < limits.refuse_below:
        raise QcftError(
            f"merging {step.phase} kept only {share:.0%} of what it learned, under {limits.refuse_below:.0%}",
            "keep the adapter live under the next phase instead (start: stacked), which is exact; or train it longer "
            "or with a higher lr; --set merge.refuse_below=null goes on all the same. For use in 16 bits only: "
            "qcft merge --base dequantised",
        )
    elif share < limits.warn_below:
        watch.note(f"merging {step.phase} kept only {share:.0%} of what it learned", "warning")
