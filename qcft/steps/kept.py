"""How much of what a phase learned survives merging."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from qcft.errors import QcftError
from qcft.events import Watch
from qcft.measure.distance import compare, predictions
from qcft.measure.score import RowScore, read_scores, score_set
from qcft.measure.stats import kept
from qcft.models.load import free_memory
from qcft.recipe import MergeLimits
from qcft.replay.pools import ENGLISH
from qcft.steps.needs import answers_held
from qcft.steps.step import Bench, Step, Work
from qcft.store.metrics import KeptMetrics
from qcft.store.opened import Record
from qcft.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Kept(Work[KeptMetrics]):
    """Compares base, live adapters and merged model on the held-out rows of the phases that the adapters hold."""

    kind: ClassVar[str] = "kept"
    format: ClassVar[int] = 3

    phases: tuple[str, ...]
    quantize: str

    def do(self, step: Step, bench: Bench, folder: Path) -> KeptMetrics:
        """Compare them; the parents are the measurements of the three."""
        merged = step.parents[2]
        scores = read_scores(bench.store.opened(merged))
        return self.compare(step, bench, lambda: bench.load(bench.steps[merged], self.quantize), scores)

    def compare(
        self,
        step: Step,
        bench: Bench,
        load: Callable[[], PreTrainedModel],
        scores: Mapping[str, Sequence[RowScore]] | None = None,
    ) -> KeptMetrics:
        """Compare the step's base and live adapters with the model that `load` returns; it is scored here unless its
        `scores` of each group are given."""
        base, live = (read_scores(bench.store.opened(parent)) for parent in step.parents[:2])
        live_step = bench.steps[step.parents[1]]
        groups = bench.rows.groups(live_step.settings["held_out"])
        # An external adapter has no rows of its own here: English rows are used instead.
        own = [g for g in groups if g.phase in self.phases] or [g for g in groups if g.lang == ENGLISH]
        measured = {group.name: bench.rows.measured(group) for group in own}
        rows = [row for group in own for row in measured[group.name].encoded]
        model = bench.load(live_step, live_step.settings["quantize"])
        seen = predictions(model, rows, bench.watch, f"{step.title}: live")
        del model
        free_memory()
        model = load()
        distance = compare(model, rows, seen, bench.watch, f"{step.title}: merged")
        if scores is None:
            scores = {
                name: score_set(model, one, bench.watch, f"{step.title}: {name}") for name, one in measured.items()
            }
        a, b, c = ([s for g in own for s in which[g.name]] for which in (base, live, scores))
        found = {"groups": [g.name for g in own], **asdict(kept(a, b, c)), **asdict(distance)}
        return cast("KeptMetrics", found)

    def summary(self, metrics: KeptMetrics) -> str:
        """The share that was kept, or that it cannot be measured."""
        share, gain = metrics["share"], metrics["gain"]
        far = f"KL {metrics['kl']:.3f} nats, greedy agreement {metrics['agreement']:.0%}"
        rows = counted(gain["rows"], "row")
        if share is None:
            what = f"a gain of {gain['value']:.3f} nats on {rows} is below 0.05 or its interval includes zero"
            return f"not measurable: {what}; {far}"
        return f"{share:.0%} of a gain of {gain['value']:.3f} nats, on {rows}; {far}"

    def memory(self, step: Step, bench: Bench, free: int) -> dict[str, int]:
        """The model and a batch's logits."""
        return answers_held(bench, self.quantize, (), 0)


def judge_merge(step: Step, record: Record, limits: MergeLimits, watch: Watch) -> None:
    """Warn or refuse if merging lost what the phase learned, according to the record of its `kept` step."""
    metrics, far = cast("KeptMetrics", record["metrics"]), None
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
            "or with a higher lr; --set merge.refuse_below=null continues anyway. For use in 16 bits only: "
            "qcft merge --base dequantised",
        )
    elif share < limits.warn_below:
        watch.note(f"merging {step.phase} kept only {share:.0%} of what it learned", "warning")
