"""Measuring a stage: scores of held-out rows and answers to English prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from qcft.files import write_json
from qcft.measure.score import RowScore, score_set, write_scores
from qcft.measure.stats import accuracy, bits_per_byte, mean_nll
from qcft.models.generate import Sampling, answer_prompts
from qcft.prepare.rows import english_prompts, other_prompts
from qcft.prepare.settings import SPREAD, ModelSettings
from qcft.recipe import Answers
from qcft.steps.needs import answers_held
from qcft.steps.step import Bench, Metrics, Step, Work
from qcft.store.metrics import AnswerLengths, GroupScore, ProbeMetrics, PromptAnswer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qcft.data.rows import Row
    from qcft.prepare.groups import Group


@dataclass(frozen=True)
class Measuring(Work[Metrics]):
    """Scores every held-out group and answers the English prompts.

    `samples`: the number of prompts of each other language that are answered too, for reading; no figure depends on
    them.
    """

    samples: ClassVar[int] = 0
    model: ModelSettings = field(metadata=SPREAD)
    quantize: str
    held_out: str
    answers: Answers

    def measure(self, model: PreTrainedModel, bench: Bench, label: str, folder: Path) -> ProbeMetrics:
        """Score and answer with a loaded model; its scores and answers go into `folder`."""
        scores: dict[str, list[RowScore]] = {}
        found: dict[str, GroupScore] = {}
        for group in bench.rows.groups(self.held_out):
            encoded = bench.rows.measured(group)
            rows = scores[group.name] = score_set(model, encoded, bench.watch, f"{label}: {group.name}")
            found[group.name] = {
                "phase": group.phase,
                "lang": group.lang,
                "nll": mean_nll(rows),
                "accuracy": accuracy(rows),
                "rows": len(rows),
                "answer_tokens": sum(s.tokens for s in rows),
                "left_out": encoded.left_out,
            }
            if group.is_text:
                size = sum(one.bytes for one in encoded.encoded)
                found[group.name] |= {"bytes": size, "bits_per_byte": bits_per_byte(rows, size)}
        english = english_prompts(bench.rows, self.held_out, self.answers.prompts)
        answers = self._answers(model, bench, english, f"{label}: English answers")
        write_scores(folder, scores)
        write_json(folder / "answers.json", answers)
        others = self._other_prompts(bench)
        given = self._answers(model, bench, others, f"{label}: answers in other languages")
        samples: dict[str, list[PromptAnswer]] = {}
        for (group, _), answer in zip(others, given, strict=True):
            samples.setdefault(group.lang, []).append(answer)
        if samples:
            write_json(folder / "samples.json", samples)
        return {"groups": found, "answers": _summary(answers)}

    def memory(self, step: Step, bench: Bench, free: int) -> dict[str, int]:
        """The model, the logits of a batch, and the KV cache of the answers."""
        prompts = english_prompts(bench.rows, self.held_out, self.answers.prompts) + self._other_prompts(bench)
        return answers_held(bench, self.quantize, prompts, self.answers.max_new_tokens)

    def _other_prompts(self, bench: Bench) -> list[tuple[Group, Row]]:
        return other_prompts(bench.rows, self.held_out, min(self.samples, self.answers.prompts))

    def _answers(
        self, model: PreTrainedModel, bench: Bench, prompts: Sequence[tuple[Group, Row]], label: str
    ) -> list[PromptAnswer]:
        if not prompts:
            return []
        answers = answer_prompts(
            model,
            bench.model.tokenizer,
            [bench.rows.group_encoder(group).prompt_ids(row) for group, row in prompts],
            bench.rows.group_encoder(prompts[0][0]).end_ids,
            Sampling(self.answers.max_new_tokens),
            batch=16,
            watch=bench.watch,
            label=label,
        )
        return [
            {
                "key": row.key,
                "prompt": row.prompt[-1].content,
                "text": answer.text,
                "tokens": answer.tokens,
                "finished": answer.finished,
                "reference": row.reference,
            }
            for (_, row), answer in zip(prompts, answers, strict=True)
        ]


@dataclass(frozen=True)
class Probe(Measuring[ProbeMetrics]):
    """Measures the step's model."""

    kind: ClassVar[str] = "probe"
    samples: ClassVar[int] = 2
    format: ClassVar[int] = 2

    def do(self, step: Step, bench: Bench, folder: Path) -> ProbeMetrics:
        """Load the step's model and measure it."""
        return self.measure(bench.load(step, self.quantize), bench, step.title, folder)

    def summary(self, metrics: ProbeMetrics) -> str:
        """The mean NLL of each group."""
        return ", ".join(f"{name} {g['nll']:.3f}" for name, g in metrics["groups"].items()) + " (NLL)"


def _summary(answers: Sequence[PromptAnswer]) -> AnswerLengths | None:
    if not answers:
        return None
    return {
        "rows": len(answers),
        "mean_tokens": sum(a["tokens"] for a in answers) / len(answers),
        "finished": sum(a["finished"] for a in answers) / len(answers),
    }
