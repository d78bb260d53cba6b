"""Evaluating stages on tasks: one load of weights for all stages that share them, and one step per task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from qcft.data.encode import Encoder
from qcft.data.rows import Message, Row
from qcft.errors import QcftError, short
from qcft.files import write_json, write_text
from qcft.measure.alpaca import alpaca_prompts
from qcft.measure.catalog import language_of
from qcft.measure.fidelity import judge_answer, summarise_answers
from qcft.models.generate import Answer, Sampling, answer_prompts
from qcft.models.load import free_memory, load_model
from qcft.models.switch import Switched, can_switch, reads_weights
from qcft.prepare.settings import SPREAD, ModelSettings
from qcft.recipe import ALPACA_EVAL, FIDELITY
from qcft.steps.step import Bench, Step, Work
from qcft.store.metrics import AlpacaMetrics, FidelityMetrics, JudgedAnswer, SuiteMetrics, TaskMetrics
from qcft.words import counted

if TYPE_CHECKING:
    from qcft.measure.suites import Scorer

ITEMS, OUTPUTS = "items.jsonl", "model_outputs.json"
ALPACA_TOKENS = 512  # of an answer, unless evaluate.max_new_tokens says otherwise
BATCH = 16  # prompts answered at once


class Loaded:
    """The model that several suite steps use one after the other, and its scorer."""

    def __init__(self) -> None:
        self.loads = 0
        self.model: Switched | None = None
        self.scorer: Scorer | None = None
        self._key: Any = None

    def serves(self, step: Step) -> bool:
        """Whether a step may use it."""
        return step.kind == Suite.kind

    def use(self, step: Step, quantize: str, bench: Bench) -> Switched:
        """The stage's model with its adapters active; its weights are loaded unless they already are."""
        stack = [bench.adapter(one) for one in step.stack]
        reading = reads_weights(stack)
        key = (step.weights, quantize, tuple(stack) if reading or not can_switch(stack) else None)
        if key != self._key:
            self._key = self.model = self.scorer = None
            free_memory()
            self.model = Switched(load_model(bench.weights(step), bench.model.asked, quantize), not reading)
            self._key = key
            self.loads += 1
        assert self.model is not None
        self.model.use(stack)
        return self.model


@dataclass(frozen=True)
class Suite(Work[SuiteMetrics]):
    """Evaluates one stage on one task; `data`: the digest of the task's data; `asked`: the settings of its kind."""

    kind: ClassVar[str] = "suite"
    format: ClassVar[int] = 4

    model: ModelSettings = field(metadata=SPREAD)
    quantize: str
    task: str
    data: str
    asked: Mapping[str, Any] = field(metadata=SPREAD)

    def do(self, step: Step, bench: Bench, folder: Path) -> SuiteMetrics:
        """Evaluate. Raises QcftError for any error in a task's own code."""
        try:
            if bench.shared is None:
                bench.shared = Loaded()
            model = bench.shared.use(step, self.quantize, bench)
            if self.task == FIDELITY:
                return self._fidelity(step, bench, model, folder)
            if self.task == ALPACA_EVAL:
                return self._alpaca(step, bench, model, folder)
            return self._suite(step, bench, model, folder)
        except QcftError:
            raise
        except Exception as error:  # tasks are code by many authors, and may raise anything
            text = short(error, 200)
            raise QcftError(f"{type(error).__name__}: {text}", "check the task's data, or remove the task") from error

    def summary(self, metrics: SuiteMetrics) -> str:
        """The score, or a summary of the answers."""
        if self.task == FIDELITY:
            languages = cast("FidelityMetrics", metrics)["languages"]
            shares = {lang: entry["right"] for lang, entry in languages.items()}
            found = ", ".join(f"{lang} {share:.0%}" for lang, share in shares.items() if share is not None)
            return f"answers in the prompt's language: {found or 'not identified'}"
        if self.task == ALPACA_EVAL:
            answers = cast("AlpacaMetrics", metrics)
            return f"{counted(answers['rows'], 'answer')} of {answers['mean_tokens']:.0f} tokens"
        scored = cast("TaskMetrics", metrics)
        return f"{scored['metric']} {scored['score']:.4f}, {counted(scored['items'], 'item')}"

    def _suite(self, step: Step, bench: Bench, model: Switched, folder: Path) -> TaskMetrics:
        from qcft.measure.suites import Scorer, TaskOptions

        settings, catalog, loaded = self.asked, bench.rows.catalog, bench.shared
        assert catalog is not None
        if loaded.scorer is None:
            batch = None if settings["batch"] == "auto" else settings["batch"]
            loaded.scorer = Scorer(model.model, bench.model.tokenizer, batch, bench.watch)
        options = TaskOptions(settings["limit"], settings["shots"], settings["max_new_tokens"])
        scored = loaded.scorer.score(self.task, catalog.load(self.task), options, step.title)
        lines = [json.dumps(item, ensure_ascii=False, default=_plain) + "\n" for item in scored.items]
        write_text(folder / ITEMS, "".join(lines))
        return {
            "task": self.task,
            "lang": language_of(self.task, scored.texts),
            "metric": scored.metric,
            "score": scored.scores[scored.metric],
            "scores": dict(scored.scores),
            "parts": dict(scored.parts),
            "items": len(scored.items),
            "paired": scored.is_mean,
            "higher_is_better": scored.higher_is_better,
            "shots": scored.shots,
            "generates": scored.generates,
            "prompts": scored.prompts,
            "batch": loaded.scorer.batch,
        }

    def _fidelity(self, step: Step, bench: Bench, model: Switched, folder: Path) -> FidelityMetrics:
        judged: dict[str, list[JudgedAnswer]] = {}
        for group in bench.rows.groups(self.data):
            if group.lang == "?" or group.is_text:
                continue
            rows = sorted(group.rows, key=lambda row: row.key)[: self.asked["prompts"]]
            encoder = bench.rows.group_encoder(group)
            label = f"{step.title}: {group.lang}"
            answers = _answers(bench, model, encoder, rows, self.asked["max_new_tokens"], label)
            judged.setdefault(group.lang, []).extend(judge_answer(row, answer, group.lang) for row, answer in answers)
        write_json(folder / "answers.json", judged)
        return {"task": FIDELITY, "languages": {lang: summarise_answers(rows) for lang, rows in judged.items()}}

    def _alpaca(self, step: Step, bench: Bench, model: Switched, folder: Path) -> AlpacaMetrics:
        records = alpaca_prompts(bench.rows.local(ALPACA_EVAL))[: self.asked["limit"]]
        rows = [Row((Message("user", str(record["instruction"])),), ()) for record in records]
        of_row = {id(row): record for row, record in zip(rows, records, strict=True)}
        most = self.asked["max_new_tokens"] or ALPACA_TOKENS
        answers = _answers(bench, model, bench.model.encoder_for(None, None, "drop"), rows, most, step.title)
        name = step.stage.split("/")[1]
        outputs = [
            {
                "instruction": record["instruction"],
                "output": answer.text,
                "generator": f"{Path(bench.model.asked.name).name} {name}",
                "dataset": record.get("dataset", ALPACA_EVAL),
            }
            for record, answer in ((of_row[id(row)], answer) for row, answer in answers)
        ]
        write_json(folder / OUTPUTS, outputs)
        made = [answer for _, answer in answers]
        return {
            "task": ALPACA_EVAL,
            "rows": len(made),
            "mean_tokens": sum(answer.tokens for answer in made) / len(made),
            "unfinished": sum(not answer.finished for answer in made) / len(made),
            "max_new_tokens": most,
        }


def _answers(
    bench: Bench, model: Switched, encoder: Encoder, rows: list[Row], most: int, label: str
) -> list[tuple[Row, Answer]]:
    """Greedy answers to the rows' prompts; prompts that cannot be used are dropped."""
    asked = [(row, prompt) for row in rows if not isinstance(prompt := encoder.prompt(row), str)]
    if not asked:
        raise QcftError("none of the prompts can be used", "check the rows, or raise train.max_length")
    answers = answer_prompts(
        model.model,
        bench.model.tokenizer,
        [prompt for _, prompt in asked],
        encoder.end_ids,
        Sampling(most),
        BATCH,
        bench.watch,
        label,
    )
    return [(row, answer) for (row, _), answer in zip(asked, answers, strict=True)]


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's."""
    return value.item() if hasattr(value, "item") else str(value)
