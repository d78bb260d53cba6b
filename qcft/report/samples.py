"""Stored answers to the same prompts side by side: before and after the last phase, then stage by stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from qcft.recipe import FIDELITY
from qcft.recipe.stages import ABILITIES, BASE, PROBES, merged_stage
from qcft.report.arms import ArmRuns, Evidence, members
from qcft.report.cells import listed, stage_name, text_groups
from qcft.report.document import Block, Fold, Prose, Sample, Section, StageAnswer
from qcft.report.languages import language_name
from qcft.report.standing import ENGLISH
from qcft.store.metrics import JudgedAnswer, PromptAnswer

EACH = 2  # prompts of each language, before and after
OPEN = 4  # languages whose answers are open at first
SAMPLES = 4  # English prompts, stage by stage
Stored = PromptAnswer | JudgedAnswer


def before_section(arms: Sequence[ArmRuns]) -> Section | None:
    """The first prompts in English and in each trained language: the stored answers of the stage that the last phase
    starts from and of its end (for several arms, each one's first run), and the rows' reference answers."""
    stages = _ends(arms)
    if not stages:
        return None
    given = {title: _stored(run, stage) for title, (run, stage) in stages.items()}
    groups = [g for _, run in members(arms) for g in run.run.table["groups"]]
    trained = dict.fromkeys(g["lang"] for g in groups if not g["english"] and g["lang"] != "?")
    texts = {name for _, run in members(arms) for name in text_groups(run.run.table)}
    asked = {g["lang"] for g in groups if g["name"] not in texts}
    blocks: list[Block] = []
    missing: list[str] = []  # languages whose rows have prompts, but no stored answers
    only_text: list[str] = []
    for lang in (ENGLISH, *trained):
        samples = _side_by_side({title: found.get(lang, ()) for title, found in given.items()}, lang)[:EACH]
        if samples:
            blocks.append(Fold(language_name(lang), samples, len(blocks) < OPEN))
        elif lang != ENGLISH:
            (missing if lang in asked else only_text).append(language_name(lang))
    if only_text:
        blocks.append(Prose((f"The rows in {listed(only_text)} are raw text: without prompts, there are no answers.",)))
    if missing:
        name = arms[0].runs[0].run.name
        blocks.append(
            Prose(
                (
                    f"No answers in {listed(missing)} are stored. `qcft eval {name} --task {FIDELITY}` stores some for "
                    f"this page; `qcft compare {name}` prints some, with the rows' reference answers.",
                )
            )
        )
    title = f"Before and after {arms[0].runs[0].recipe.phases[-1].name}"
    return Section("before", title, tuple(blocks)) if blocks else None


def samples_section(arms: Sequence[ArmRuns]) -> Section | None:
    """The first English prompts with every stage's answers; for several arms, the prompts that `before_section` does
    not show."""
    if len(arms) == 1:
        run = arms[0].runs[0]
        stages = {stage_name(row): (run, row["stage"].removeprefix(PROBES)) for row in run.run.table["stages"]}
    else:
        stages = _ends(arms)
    given = {title: _stored(run, stage).get(ENGLISH, ()) for title, (run, stage) in stages.items()}
    samples = _side_by_side(given, ENGLISH)[EACH if len(arms) > 1 else 0 : SAMPLES]
    title = "Greedy answers to held-out English prompts" if len(arms) == 1 else "More answers in English"
    return Section("answers", title, samples) if samples else None


def measured_start(run: Evidence) -> str:
    """The measured stage that a run's last phase starts from: `merged`, `phase1`, `base`."""
    *earlier, last = run.recipe.phases
    if not earlier or last.start == "base":
        return BASE
    before = earlier[-1].name
    merged = merged_stage(before, run.recipe.phases[0].name)
    return merged if last.start == "merged" and PROBES + merged in run.run.stages else before


def _ends(arms: Sequence[ArmRuns]) -> dict[str, tuple[Evidence, str]]:
    """Title -> run and stage: the start of the first arm's last phase, and the end of each arm's. Empty if no end is
    measured."""
    first = arms[0].runs[0]
    after = {
        f"after: {arm.label(run)}" if len(arms) > 1 else f"after: {run.last.name.removeprefix(PROBES)}": (
            run,
            run.recipe.phases[-1].name,
        )
        for arm in arms
        if (run := arm.runs[0]).last
    }
    start = measured_start(first)
    names = {row["stage"]: row["name"] for row in first.run.table["stages"]}
    before = {f"before: {names[PROBES + start]}": (first, start)} if PROBES + start in names else {}
    return before | after if after else {}


def _stored(run: Evidence, stage: str) -> dict[str, Sequence[Stored]]:
    """Language -> the stored answers of a stage, in the order of their prompts."""
    stages = run.run.stages
    found: dict[str, Sequence[Stored]] = {}
    answered = stages.get(PROBES + stage)
    if answered and answered.opened.has("samples.json"):  # earlier versions wrote none
        found |= cast("Mapping[str, list[PromptAnswer]]", answered.opened.json("samples.json"))
    if judged := stages.get(f"{ABILITIES}{stage}/{FIDELITY}"):
        found |= cast("Mapping[str, list[JudgedAnswer]]", judged.opened.json("answers.json"))
    if answered:
        english = cast("list[PromptAnswer]", answered.opened.json("answers.json"))
        found |= {ENGLISH: english} if english else {}
    return found


def _side_by_side(given: Mapping[str, Iterable[Stored]], lang: str) -> tuple[Sample, ...]:
    """The prompts of the first stage that has some, with every stage's answer and the row's reference."""
    by_prompt = {title: {answer["prompt"]: answer for answer in answers} for title, answers in given.items()}
    prompts = next((found for found in by_prompt.values() if found), {})
    samples = []
    for prompt in prompts:
        own = {title: found[prompt] for title, found in by_prompt.items() if prompt in found}
        answers = [
            StageAnswer(title, answer["text"] or "(no text)", answer["finished"]) for title, answer in own.items()
        ]
        references = [text for answer in own.values() if (text := answer.get("reference"))]
        answers += [StageAnswer("reference", text, finished=True) for text in references[:1]]
        samples.append(Sample(prompt, lang, tuple(answers)))
    return tuple(samples)
