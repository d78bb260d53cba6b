"""Answers to the same prompts, stage by stage or arm by arm, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from qcft.report.arms import Arm
from qcft.report.cells import stage_name
from qcft.report.document import Answer, Sample, Section
from qcft.report.standing import ENGLISH
from qcft.store.metrics import PromptAnswer

SAMPLES = 4


def samples_section(arms: Sequence[Arm]) -> Section | None:
    """The first prompts with every stage's answers; of several arms, the last stage's of each one's first run."""
    given = _given(arms)
    first = next(iter(given.values()), {})
    samples = []
    for key, entry in list(first.items())[:SAMPLES]:
        answers = tuple(
            Answer(name, answers[key]["text"], answers[key]["finished"])
            for name, answers in given.items()
            if key in answers and answers[key]["prompt"] == entry["prompt"]
        )
        samples.append(Sample(entry["prompt"], ENGLISH, answers))
    return Section("answers", "Greedy answers to held-out English prompts", tuple(samples)) if samples else None


def _given(arms: Sequence[Arm]) -> dict[str, dict[str, PromptAnswer]]:
    """Stage or arm -> prompt's key -> answer. Of several arms the first phase, and the last of each one's first run."""
    found: dict[str, dict[str, PromptAnswer]] = {}
    for arm in arms:
        run = arm.runs[0]
        for row in run.run.table["stages"]:
            stage = run.run.stages[row["stage"]]
            name = stage_name(row)
            if len(arms) > 1:
                if stage == run.last:
                    name = arm.label(run)
                elif stage.name not in {"eval/base", f"eval/{run.recipe.phases[0].name}"}:
                    continue
            answers = cast("list[PromptAnswer]", stage.opened.json("answers.json"))
            if answers:
                found.setdefault(name, {answer["key"]: answer for answer in answers})
    return found
