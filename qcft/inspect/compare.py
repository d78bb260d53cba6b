"""The answers of several stages, of one run or of two, to the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qcft.data.filters import identified
from qcft.errors import InputError
from qcft.events import Watch
from qcft.inspect.prompts import Question, given_prompts, held_out_questions, prompt_ids, text_lines
from qcft.inspect.stages import StageLoader, StageModel, distinct, finished_phases
from qcft.inspect.versions import version_of
from qcft.models.generate import Answer, Sampling, answer_prompts
from qcft.prepare.model import PreparedModel
from qcft.prepare.prepared import Prepared
from qcft.recipe.stages import BASE
from qcft.report.comparison import Compared, ComparedPrompt, check_page, write_comparison
from qcft.runner.stored import model_of, rows_of, stored_steps
from qcft.steps.step import Step
from qcft.store import NamedRun, Store, read_run

ROWS = 2  # held-out rows of each language, where no number is given
BATCH = 16  # prompts answered at once, as when a stage is measured


@dataclass(frozen=True)
class Comparing:
    """What is compared: stages of a run, and of another where one is named. No stages: base and each finished phase; of
    two runs base and the last one of each. They answer `prompts`, the lines of `file`, and `rows` held-out rows of
    each of `langs`; where none of these is given, held-out rows of every language."""

    run: str | None = None
    other: str | None = None
    stages: Sequence[str] = ()
    prompts: Sequence[str] = ()
    file: Path | None = None
    rows: int | None = None
    langs: Sequence[str] = ()
    max_new_tokens: int | None = None


def compare_stages(asked: Comparing, runs: Path, watch: Watch, to: Path | None = None) -> Compared:
    """Each stage's greedy answer to each prompt: its text, its length in tokens, whether it ended by itself, and its
    language, None where it is too short to identify; of held-out rows the reference answer too. Written to a page where
    `to` names one; nothing is written into the run.

    Raises InputError, before any weights are loaded, for what cannot be compared.
    """
    if to is not None:
        check_page(to)
    for number, what in ((asked.max_new_tokens, "max_new_tokens"), (asked.rows, "held-out rows")):
        if number is not None and number < 1:
            raise InputError(f"{what}: {number} is less than 1", "give a number of at least 1")
    lines = text_lines(asked.file, "--prompts", "give a file with one prompt per line") if asked.file else []
    store, named = Store(runs), read_run(runs, asked.run)
    if asked.other == named.name:
        raise InputError(f"--with {named.name!r} is the run itself", "name another run, or omit --with")
    recipe, steps = named.recipe(), stored_steps(named, store)
    most = asked.max_new_tokens or recipe.answers.max_new_tokens
    names = asked.stages or [BASE, *finished_phases(named, store)[-1 if asked.other else 0 :]]
    for name in names:
        version_of(named, name, store)
    questions = given_prompts([*asked.prompts, *lines], recipe.phases[-1].system)
    prepared: PreparedModel
    if asked.rows or asked.langs or not questions:
        prepared = with_rows = _rows_of(named, steps, watch)
        questions += held_out_questions(with_rows, asked.langs, asked.rows or ROWS, most)
    else:
        prepared = model_of(named, steps, watch)
    stages = _stages_of(named, names, prepared, store)
    if asked.other is not None:
        stages = _with_other(stages, named, asked, prepared, store, watch)
    stages = distinct(stages, watch)
    answers = _answers(stages, questions, most, store, watch)
    found: Compared = {
        "run": named.name,
        "with": asked.other,
        "model": recipe.model.name,
        "max_new_tokens": most,
        "stages": [stage.label for stage in stages],
        "prompts": [_as_data(q, {stage: each[i] for stage, each in answers.items()}) for i, q in enumerate(questions)],
    }
    if to is not None:
        write_comparison(to, found)
    return found


def _rows_of(run: NamedRun, steps: Sequence[Step], watch: Watch) -> Prepared:
    try:
        return rows_of(run, steps, watch)
    except InputError as error:
        raise InputError(error.message, f"{error.hint}; or give your own prompts: --prompt TEXT") from None


def _stages_of(run: NamedRun, names: Sequence[str], prepared: PreparedModel, store: Store) -> list[StageModel]:
    return [StageModel(name, version_of(run, name, store), prepared) for name in names]


def _with_other(
    stages: Sequence[StageModel], run: NamedRun, asked: Comparing, prepared: PreparedModel, store: Store, watch: Watch
) -> list[StageModel]:
    """The stages of both runs, labelled by their run too; a base that they share stays `base`."""
    other = read_run(store.runs, asked.other)
    steps = stored_steps(other, store)
    names = asked.stages or [BASE, *finished_phases(other, store)[-1:]]
    theirs = _stages_of(other, names, model_of(other, steps, watch), store)
    if _held_out(stored_steps(run, store)) != _held_out(steps):
        watch.note(
            f"{other.name} holds out other rows than {run.name}: held-out rows of {run.name} may be among those that "
            f"{other.name} was trained on",
            "warning",
        )
    return [
        StageModel(
            one.label if one.label == BASE and one.prepared.key == prepared.key else f"{of.name}.{one.label}",
            one.version,
            one.prepared,
        )
        for of, own in ((run, stages), (other, theirs))
        for one in own
    ]


def _held_out(steps: Sequence[Step]) -> set[str]:
    return {step.settings["held_out"] for step in steps if step.kind == "probe"}


def _answers(
    stages: Sequence[StageModel], questions: Sequence[Question], most: int, store: Store, watch: Watch
) -> dict[str, list[Answer]]:
    """The answers of each stage, by its label; stages that share weights answer one after the other."""
    prompts = {stage.prepared.key: _prompts(questions, stage.prepared, most) for stage in stages}
    loader = StageLoader(store, watch)
    weights = [loader.weights_of(stage) for stage in stages]
    found: dict[str, list[Answer]] = {}
    for stage in sorted(stages, key=lambda one: weights.index(loader.weights_of(one))):
        prepared = stage.prepared
        end_ids = prepared.encoder_for(None, None, "drop").end_ids
        model, label = loader.use(stage), f"answers of {stage.label}"
        found[stage.label] = answer_prompts(
            model, prepared.tokenizer, prompts[prepared.key], end_ids, Sampling(most), BATCH, watch, label
        )
    return {stage.label: found[stage.label] for stage in stages}


def _prompts(questions: Sequence[Question], prepared: PreparedModel, most: int) -> list[list[int]]:
    found = []
    for question in questions:
        ids = prompt_ids(question, prepared, most)
        if isinstance(ids, str):
            text = " ".join(question.text.split())
            raise InputError(
                f"the prompt {text[:40]!r} cannot be used: {ids}", "shorten it, or give a smaller --max-new-tokens"
            )
        found.append(ids)
    return found


def _as_data(question: Question, answers: Mapping[str, Answer]) -> ComparedPrompt:
    return {
        "prompt": question.text,
        "held_out": question.group,
        "lang": question.lang,
        "reference": question.reference,
        "answers": {
            stage: {
                "text": answer.text,
                "tokens": answer.tokens,
                "finished": answer.finished,
                "lang": identified(answer.text),
            }
            for stage, answer in answers.items()
        },
    }
