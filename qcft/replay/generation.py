"""Answers to a pool's prompts, generated in chunks on demand and stored for all runs that draw from the pool."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict, cast

from qcft.data.encode import Encoder
from qcft.data.mix import stable_seed
from qcft.data.rows import Row
from qcft.events import Watch
from qcft.files import read_sealed, write_sealed
from qcft.models.generate import Sampling, answer_batches
from qcft.store.metrics import GenerationCost

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST = 64  # prompts answered at once, unless memory sets a lower limit
CHUNKS = "chunks"

Pace = Callable[[float], None]  # called with the tokens generated per second


@dataclass(frozen=True)
class Answering:
    """How prompts are answered: the sampling, the prompts in a chunk, how many are answered at once."""

    seed: int
    max_new_tokens: int
    temperature: float
    top_p: float
    chunk: int
    batch: int | Literal["auto"]


class ChunkAnswer(TypedDict):
    """The answer to one prompt of a chunk, or why it was skipped."""

    prompt: str
    skipped: NotRequired[str]
    text: NotRequired[str]
    tokens: NotRequired[int]
    finished: NotRequired[bool]


class Chunk(TypedDict):
    """The content of a chunk's file. `batches`: the positions of the prompts that were answered at once; `batch`: how
    many to start the next chunk with."""

    chunk: int
    seed: int
    seconds: float
    batches: list[list[int]]
    batch: int
    answers: list[ChunkAnswer]


@dataclass(frozen=True)
class Generated:
    """One prompt's answer, or why the prompt could not be used (`skipped`), with its chunk."""

    row: Row
    text: str
    tokens: int
    finished: bool
    skipped: str | None
    chunk: int
    seed: int


class Generation:
    """The answers of one pool, in the pool's order.

    Each chunk of prompts has its own seed and its own file, which is complete or does not exist, so a killed run
    resumes at the next chunk and a larger ratio adds chunks. The model is loaded when the first answer is missing.
    `fits`: prompts to answer at once at the start, if `batch` is auto.
    """

    def __init__(
        self,
        folder: Path,
        rows: tuple[Row, ...],
        how: Answering,
        encoder: Encoder,
        load: Callable[[], PreTrainedModel],
        watch: Watch,
        fits: int = LARGEST,
    ) -> None:
        self.folder = folder / CHUNKS
        self.folder.mkdir(exist_ok=True)
        self.rows = rows
        self.how = how
        self.encoder = encoder
        self.load = load
        self.watch = watch
        self.made = self.reused = 0  # chunks
        self.answers = self.tokens = 0
        self.seconds = 0.0
        self._model: PreTrainedModel | None = None
        self._batch = min(fits if how.batch == "auto" else how.batch, how.chunk)

    def draw(self, pace: Pace) -> Iterator[Generated]:
        """Answers one after the other; a chunk is generated when its first answer is needed."""
        size = self.how.chunk
        for number, start in enumerate(range(0, len(self.rows), size)):
            rows = self.rows[start : start + size]
            seed = stable_seed(f"{self.how.seed}:chunk:{number}")
            chunk = self._chunk(number, seed, rows, pace)
            self._batch = chunk["batch"]
            self.seconds += chunk["seconds"]
            self.answers += sum("skipped" not in answer for answer in chunk["answers"])
            self.tokens += sum(answer.get("tokens", 0) for answer in chunk["answers"])
            for row, answer in zip(rows, chunk["answers"], strict=True):
                made = (answer.get("text", ""), answer.get("tokens", 0), answer.get("finished", False))
                yield Generated(row, *made, answer.get("skipped"), number, seed)

    def summary(self) -> GenerationCost:
        """The cost of the answers drawn, including reused ones."""
        return {
            "answers": self.answers,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 2),
            "tokens_per_second": round(self.tokens / max(1e-9, self.seconds), 1),
            "chunks_made": self.made,
            "chunks_reused": self.reused,
            "batch": self._batch,
        }

    def _chunk(self, number: int, seed: int, rows: tuple[Row, ...], pace: Pace) -> Chunk:
        file = self.folder / f"{number:06d}.json"
        chunk = cast("Chunk | None", read_sealed(file))
        if chunk is not None:
            self.reused += 1
            return chunk
        if file.is_file():
            self.watch.note(f"{file.name} of the replay pool was altered; it is generated again", "warning")
        chunk = self._make(number, seed, rows, pace)
        write_sealed(file, chunk)
        self.made += 1
        return chunk

    def _make(self, number: int, seed: int, rows: tuple[Row, ...], pace: Pace) -> Chunk:
        if self._model is None:
            self._model = self.load()
        prompts = [self.encoder.prompt(row) for row in rows]
        asked = [prompt for prompt in prompts if not isinstance(prompt, str)]
        sampling = Sampling(self.how.max_new_tokens, self.how.temperature, self.how.top_p, seed)
        begun = time.monotonic()

        def report(done: int, tokens: int) -> None:
            pace(tokens / max(1e-9, time.monotonic() - begun))

        answers, batches = answer_batches(
            self._model, self.encoder.tokenizer, asked, self.encoder.end_ids, sampling, self._batch, report
        )
        fitted = max(map(len, batches), default=self._batch)
        answered = iter(answers)
        entries: list[ChunkAnswer] = []
        for row, prompt in zip(rows, prompts, strict=True):
            entry: ChunkAnswer = {"prompt": row.prompt_digest[:16]}
            if isinstance(prompt, str):
                entry["skipped"] = prompt
            else:
                answer = next(answered)
                entry |= {"text": answer.text, "tokens": answer.tokens, "finished": answer.finished}
            entries.append(entry)
        return {
            "chunk": number,
            "seed": seed,
            "seconds": round(time.monotonic() - begun, 2),
            "batches": batches,
            "batch": min(self._batch, fitted) if len(batches) > 1 else self._batch,
            "answers": entries,
        }
