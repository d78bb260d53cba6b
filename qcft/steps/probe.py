"""Measuring a stage: held-out rows scored, English prompts answered."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.files import write_json
from qcft.measure.score import RowScore, score_rows, write_scores
from qcft.measure.stats import accuracy, mean_nll
from qcft.models.generate import Sampling, answer_prompts
from qcft.steps.base import StepWork
from qcft.steps.step import Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ProbeWork(StepWork):
    """Does the `probe` steps."""

    def work(self, step: Step, folder: Path) -> dict[str, Any]:
        """Score every held-out group and answer the English prompts."""
        return self.measure(self.load(step, quantize=step.settings["quantize"]), step, step.title, folder)

    def measure(self, model: PreTrainedModel, step: Step, label: str, folder: Path) -> dict[str, Any]:
        """Score and answer with a loaded model; its scores and answers go into `folder`."""
        scores: dict[str, list[RowScore]] = {}
        groups: dict[str, Any] = {}
        for group in self.prepared.groups:
            encoded = self.prepared.held_out(group)
            rows = score_rows(model, encoded.encoded, self.watch, f"{label}: {group.name}")
            scores[group.name] = [replace(s, key=r.key) for r, s in zip(encoded.rows, rows, strict=True)]
            groups[group.name] = {
                "phase": group.phase,
                "lang": group.lang,
                "nll": mean_nll(rows),
                "accuracy": accuracy(rows),
                "rows": len(rows),
                "answer_tokens": sum(s.tokens for s in rows),
                "left_out": encoded.left_out,
            }
        answers = self._answers(model, step)
        write_scores(folder, scores)
        write_json(folder / "answers.json", answers)
        return {"groups": groups, "answers": _summary(answers)}

    def _answers(self, model: PreTrainedModel, step: Step) -> list[dict[str, Any]]:
        prompts = self.prepared.english_prompts()
        if not prompts:
            return []
        group = prompts[0][0]
        encoder = self.prepared.group_encoder(group)
        answers = answer_prompts(
            model,
            self.prepared.tokenizer,
            [encoder.prompt_ids(row) for _, row in prompts],
            encoder.end_ids,
            Sampling(self.recipe.answers.max_new_tokens),
            batch=16,
            watch=self.watch,
            label=f"{step.title}: English answers",
        )
        return [
            {"key": row.key, "prompt": row.prompt[-1].content, **asdict(answer)}
            for (_, row), answer in zip(prompts, answers, strict=True)
        ]


def _summary(answers: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not answers:
        return None
    return {
        "rows": len(answers),
        "mean_tokens": sum(a["tokens"] for a in answers) / len(answers),
        "finished": sum(a["finished"] for a in answers) / len(answers),
    }
