"""Evaluating stages on tasks: one load of weights for all stages that share them, one step for each task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.data.encode import Encoder
from qcft.data.rows import Message, Row
from qcft.errors import QcftError, short
from qcft.events import Watch
from qcft.files import write_json, write_text
from qcft.measure.alpaca import alpaca_prompts
from qcft.measure.catalog import language_of
from qcft.measure.fidelity import judge_answer, summarise_answers
from qcft.models.generate import Answer, Sampling, answer_prompts
from qcft.models.load import free_memory, load_model
from qcft.models.switch import Switched, can_switch
from qcft.prepare.prepared import Prepared
from qcft.recipe import ALPACA_EVAL, FIDELITY
from qcft.steps.base import StepWork
from qcft.steps.step import Step
from qcft.store import Store

if TYPE_CHECKING:
    from qcft.measure.suites import Scorer

ITEMS, OUTPUTS = "items.jsonl", "model_outputs.json"
ALPACA_TOKENS = 512  # of an answer, unless evaluate.max_new_tokens says otherwise
BATCH = 16  # prompts answered at once


class SuiteWork(StepWork):
    """Does the `suite` steps of one run, and keeps what it loaded from one to the next."""

    def __init__(self, prepared: Prepared, steps: Mapping[str, Step], store: Store, watch: Watch) -> None:
        super().__init__(prepared, steps, store, watch)
        self.loads = 0
        self._key: Any = None
        self._model: Switched | None = None
        self._scorer: Scorer | None = None

    def work(self, step: Step, folder: Path) -> dict[str, Any]:
        """Evaluate one stage on one task. Raises QcftError, whatever a task's own code raises."""
        task = step.settings["task"]
        try:
            self._use(step)
            if task == FIDELITY:
                return self._fidelity(step, folder)
            return self._alpaca(step, folder) if task == ALPACA_EVAL else self._suite(step, folder)
        except QcftError:
            raise
        except Exception as error:  # tasks are code by many hands, and may raise anything
            text = short(error, 200)
            raise QcftError(f"{type(error).__name__}: {text}", "look at the task's data, or leave it out") from error

    def drop(self) -> None:
        """Let go of the model, if there is one."""
        if self._model is None:
            return
        self._key = self._model = self._scorer = None
        free_memory()

    def _use(self, step: Step) -> None:
        """Have the stage's model at hand: its weights loaded, unless they are, and its adapters live."""
        stack = [self.adapter(one) for one in (*step.under, step.adapter) if one]
        quantize = step.settings["quantize"]
        key = (step.weights, quantize, None if can_switch(stack) else tuple(stack))
        if key != self._key:
            self.drop()
            self._model = Switched(load_model(self.weights(step), self.prepared.recipe.model, quantize))
            self._key = key
            self.loads += 1
        assert self._model is not None
        self._model.use(stack)

    def _suite(self, step: Step, folder: Path) -> dict[str, Any]:
        from qcft.measure.suites import Asked, Scorer

        settings, catalog = step.settings, self.prepared.catalog
        assert self._model is not None
        assert catalog is not None
        if self._scorer is None:
            batch = None if settings["batch"] == "auto" else settings["batch"]
            self._scorer = Scorer(self._model.model, self.prepared.tokenizer, batch, self.watch)
        asked = Asked(settings["limit"], settings["shots"], settings["max_new_tokens"])
        scored = self._scorer.score(settings["task"], catalog.load(settings["task"]), asked, step.title)
        lines = [json.dumps(item, ensure_ascii=False, default=_plain) + "\n" for item in scored.items]
        write_text(folder / ITEMS, "".join(lines))
        return {
            "task": settings["task"],
            "lang": language_of(settings["task"], scored.texts),
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
            "batch": self._scorer.batch,
        }

    def _fidelity(self, step: Step, folder: Path) -> dict[str, Any]:
        judged: dict[str, list[dict[str, Any]]] = {}
        for group in self.prepared.groups:
            if group.lang == "?":
                continue
            rows = sorted(group.rows, key=lambda row: row.key)[: step.settings["prompts"]]
            encoder = self.prepared.group_encoder(group)
            answers = self._answers(encoder, rows, step.settings["max_new_tokens"], f"{step.title}: {group.lang}")
            judged.setdefault(group.lang, []).extend(
                {"prompt": row.prompt[-1].content, **judge_answer(answer, group.lang)} for row, answer in answers
            )
        write_json(folder / "answers.json", judged)
        return {"task": FIDELITY, "languages": {lang: summarise_answers(rows) for lang, rows in judged.items()}}

    def _alpaca(self, step: Step, folder: Path) -> dict[str, Any]:
        records = alpaca_prompts(self.prepared.recipe.evaluate.local.get(ALPACA_EVAL))[: step.settings["limit"]]
        rows = [Row((Message("user", str(record["instruction"])),), ()) for record in records]
        most = step.settings["max_new_tokens"] or ALPACA_TOKENS
        answers = self._answers(self.prepared.encoder_for(None, None, "drop"), rows, most, step.title)
        name = step.stage.split("/")[1]
        outputs = [
            {
                "instruction": record["instruction"],
                "output": answer.text,
                "generator": f"{Path(self.prepared.recipe.model.name).name} {name}",
                "dataset": record.get("dataset", ALPACA_EVAL),
            }
            for record, (_, answer) in zip(records, answers, strict=True)
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

    def _answers(self, encoder: Encoder, rows: list[Row], most: int, label: str) -> list[tuple[Row, Answer]]:
        """Greedy answers to the rows' prompts; those that cannot be asked are left out."""
        asked = [(row, prompt) for row in rows if not isinstance(prompt := encoder.prompt(row), str)]
        if not asked:
            raise QcftError("none of the prompts can be asked", "look at the rows, or raise train.max_length")
        assert self._model is not None
        answers = answer_prompts(
            self._model.model,
            self.prepared.tokenizer,
            [prompt for _, prompt in asked],
            encoder.end_ids,
            Sampling(most),
            BATCH,
            self.watch,
            label,
        )
        return [(row, answer) for (row, _), answer in zip(asked, answers, strict=True)]


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's."""
    return value.item() if hasattr(value, "item") else str(value)
