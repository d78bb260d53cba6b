"""A conversation with a run's stages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from qcft.data.rows import Message, Row
from qcft.errors import InputError
from qcft.events import Watch
from qcft.files import exists, reporting_unwritable, write_text
from qcft.inspect.prompts import Question, positions_of, prompt_ids, prompt_text
from qcft.inspect.stages import StageLoader, StageModel, finished_phases
from qcft.inspect.versions import version_of
from qcft.models.generate import Answer, Sampling
from qcft.models.stream import stream_answer
from qcft.recipe.stages import BASE
from qcft.runner.stored import model_of, stored_steps
from qcft.store import Store, read_run

TOKENS = 512  # of an answer
HOTTEST = 100.0  # a temperature at which all tokens are about equally likely


class Chat:
    """A conversation with one stage of a run, or with two at once; the stage can be switched at any time.

    Each of two stages sees its own answers. Prompts are formatted by the run's chat template with the system prompt
    of the stage's phase, unless `system` is given. Nothing is written into the run. Weights are loaded when they are
    first needed, one set at a time. Raises InputError.
    """

    def __init__(
        self,
        run: str | None,
        runs: Path,
        watch: Watch,
        stage: str | None = None,
        temperature: float = 0.0,
        max_new_tokens: int = TOKENS,
        system: str | None = None,
    ) -> None:
        if not 0 <= temperature <= HOTTEST or 0 < temperature < 1 / HOTTEST:
            raise InputError(
                f"temperature: {temperature:g} is neither 0 nor a number from {1 / HOTTEST:g} to {HOTTEST:g}",
                "0 is greedy; 0.7 is usual",
            )
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {max_new_tokens} is less than 1", "give a number of at least 1")
        self._store, self._run = Store(runs), read_run(runs, run)
        self._recipe = self._run.recipe()
        if stage is None:
            stage = finished_phases(self._run, self._store)[-1]
            if stage != (last := self._recipe.phases[-1].name):
                watch.note(f"{last} of the run {self._run.name!r} is not done; {stage} answers instead", "warning")
        version_of(self._run, stage, self._store)
        self._prepared = model_of(self._run, stored_steps(self._run, self._store), watch)
        self._system, self._temperature, self._most = system, temperature, max_new_tokens
        self._loader = StageLoader(self._store, watch)
        self._turns: dict[str, list[Message]] = {stage: []}
        self._answered = 0
        self.run = self._run.name

    @property
    def stages(self) -> list[str]:
        """The stages that answer: one or two."""
        return [*self._turns]

    def use(self, stage: str) -> None:
        """Continue with another stage, which sees the conversation so far."""
        self._loader.use(self._model(stage))
        self._turns = {stage: self._turns.get(stage) or next(iter(self._turns.values()))}

    def both(self, stage: str | None = None) -> None:
        """Let another stage (base by default, or the last phase beside base) answer too, from now on."""
        own = self.stages[0]
        if stage is None:
            stage = BASE if own != BASE else finished_phases(self._run, self._store)[-1]
        self._model(stage)
        if stage == own:
            raise InputError(f"{stage} is answering already", "name another stage")
        self._turns = {own: self._turns[own], stage: [*self._turns[own]]}

    def reset(self) -> None:
        """Forget the conversation."""
        self._turns = {stage: [] for stage in self._turns}

    def load(self) -> None:
        """Load the weights now."""
        self._loader.use(self._model(self.stages[0]))

    def answer(self, prompt: str) -> dict[str, Answer]:
        """The answer of each stage. Raises InputError for a prompt that cannot be used."""
        return dict(self.answers(prompt))

    def answers(
        self,
        prompt: str,
        on_text: Callable[[str, str], None] = lambda stage, text: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[str, Answer]]:
        """Each stage with its answer, as soon as it is complete, the loaded stage's first.

        `on_text` gets a stage and the next piece of its text; once `stopped()` is true the answer is cut off.
        """
        text = prompt_text(prompt)
        for stage in sorted(self._turns, key=lambda one: not self._loader.has(self._model(one))):
            if not stopped():
                yield stage, self._answer(stage, text, on_text, stopped)

    def save(self, path: Path) -> int:
        """Write the conversation to a new file, a JSON line for each stage, in the format of training data; returns the
        number of turns. Raises InputError."""
        if exists(path):
            raise InputError(f"{str(path)!r} exists already", "name a new file")
        if not any(self._turns.values()):
            raise InputError("there is nothing to save yet", "ask something first")
        lines = [
            json.dumps({"run": self.run, "stage": stage, "messages": [m.as_dict() for m in turns]}, ensure_ascii=False)
            for stage, turns in self._turns.items()
        ]
        with reporting_unwritable(path, "the file", "name another file"):
            write_text(path, "".join(f"{line}\n" for line in lines))
        return sum(map(len, self._turns.values()))

    def _answer(
        self, stage: str, prompt: str, on_text: Callable[[str, str], None], stopped: Callable[[], bool]
    ) -> Answer:
        model, turns = self._model(stage), [*self._turns[stage], Message("user", prompt)]
        question = Question(Row(tuple(turns), ()), self._system or self._system_of(stage))
        ids = prompt_ids(question, self._prepared, 1)
        if isinstance(ids, str):
            raise InputError(f"the prompt cannot be used: {ids}", "shorten it, or start over with /reset")
        room = (positions_of(self._prepared) or math.inf) - len(ids)
        answer = stream_answer(
            self._loader.use(model),
            self._prepared.tokenizer,
            ids,
            self._prepared.encoder_for(None, None, "drop").end_ids,
            Sampling(int(min(self._most, room)), self._temperature, seed=self._answered),
            lambda text: on_text(stage, text),
            stopped,
        )
        self._answered += 1
        if answer.text:
            self._turns[stage] = [*turns, Message("assistant", answer.text)]
        return answer

    def _model(self, stage: str) -> StageModel:
        return StageModel(stage, version_of(self._run, stage, self._store), self._prepared)

    def _system_of(self, stage: str) -> str | None:
        """The system prompt of the stage's phase; for other stages, such as base, the last phase's."""
        phases = self._recipe.phases
        return next((phase.system for phase in phases if phase.name == stage), phases[-1].system)
