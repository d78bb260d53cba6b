"""Replay rows: answered by the model that a phase starts from, or chosen from data."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, cast

from qcft.data.encode import Encoder
from qcft.errors import QcftError
from qcft.models.load import free_bytes
from qcft.prepare.settings import ADDED, SPREAD, Limits, ModelSettings, Settings, kept_alive
from qcft.recipe import Filters, Replay, ReplayPart
from qcft.replay.amount import replay_amount, rounded
from qcft.replay.generation import Answering, Generation
from qcft.replay.rows import make_replay
from qcft.steps.needs import answered_at_once, model_held
from qcft.steps.step import Bench, Step, Work
from qcft.store.metrics import ReplayMetrics
from qcft.words import counted

if TYPE_CHECKING:
    from qcft.training.memory import Planned

TEXT, RECORD = 6, 300  # bytes of a token as text and of a row's record around it, roughly


@dataclass(frozen=True)
class Answers(Work[Mapping[str, object]]):
    """The answers of a model to prompts in their order, as many as were needed so far: never done, as a larger ratio
    needs more of them."""

    kind: ClassVar[str] = "pool"

    model: ModelSettings = field(metadata=SPREAD)
    quantize: str
    prompts: str
    seed: int
    system: str | None
    max_length: int
    max_new_tokens: int
    temperature: float
    top_p: float
    chunk: int
    batch: int | Literal["auto"]

    def how(self) -> Answering:
        """How the prompts are answered."""
        return Answering(self.seed, self.max_new_tokens, self.temperature, self.top_p, self.chunk, self.batch)

    def do(self, step: Step, bench: Bench, folder: Path) -> NoReturn:
        """Refuse: they are generated while replay is drawn. Raises QcftError."""
        raise QcftError("answers are generated while replay is drawn from them", "please report this")


@dataclass(frozen=True)
class DrawnFrom(Settings):
    """One kind of replay: its weight among several, and the digest of what it is drawn from."""

    kind: str
    weight: float
    pool: str | None
    rows: str
    phase: str | None = field(default=None, metadata=ADDED)


@dataclass(frozen=True)
class ReplayRows(Work[ReplayMetrics]):
    """Draws replay of each kind beside the rows of a phase, generating the answers that are missing."""

    kind: ClassVar[str] = "replay"
    format: ClassVar[int] = 2

    model: ModelSettings = field(metadata=SPREAD)
    parts: tuple[DrawnFrom, ...]
    ratio: float
    unit: Literal["rows", "tokens"]
    on_shortfall: Literal["error", "repeat", "shrink"]
    filters: Filters | None
    beside: str
    limits: Limits
    replay_system: str | None
    balance: Mapping[str, Any] | None = field(default=None, metadata=ADDED)

    def do(self, step: Step, bench: Bench, folder: Path) -> ReplayMetrics:
        """Draw the rows into replay.jsonl."""
        encoder, answers = self._encoder(bench), self._answers(bench)
        pools = [bench.rows.pool(step.phase, number, part.rows) for number, part in enumerate(self.parts)]
        with ExitStack() as held:
            generations: list[tuple[Generation, str, str] | None] = []
            for pool, part in zip(pools, self.parts, strict=True):
                bench.watch.note(f"replay ({part.kind}): {pool.reason}")
                if part.pool is None:
                    generations.append(None)
                    continue
                source, how = bench.steps[part.pool], answers[part.pool].how()
                place = held.enter_context(bench.store.claim(source.id, source.inputs(), bench.watch))
                load = partial(bench.load, source, answers[part.pool].quantize)
                batch, _ = answered_at_once(
                    bench.model, answers[part.pool].quantize, encoder, pool.rows, how, free_bytes()
                )
                made = Generation(place, pool.rows, how, encoder, load, bench.watch, batch)
                answerer = " + ".join(filter(None, (source.weights, *source.stack)))
                generations.append((made, answerer or self.model.model, source.id))
            new = bench.rows.encoded(bench.rows.phase(step.phase, self.beside), self.limits, self.balance)
            asked = self._asked(next(iter(answers.values()), None))
            return make_replay(step.phase or "", asked, pools, new, encoder, generations, folder, bench.watch)

    def summary(self, metrics: ReplayMetrics) -> str:
        """How much was drawn, and how much was dropped for which reason."""
        dropped = ", ".join(f"{n} {reason}" for reason, n in metrics["left_out"].items())
        share = f"{metrics['share_of_rows']:.1%} of rows, {metrics['share_of_answer_tokens']:.1%} of answer tokens"
        cut = sum(part["cut"]["rows"] for part in metrics["parts"] if "cut" in part)
        text = f"{counted(metrics['rows'], 'row')}: {share}" + (f"; {cut} answers cut at their longest" if cut else "")
        return text + (f"; left out {dropped}" if dropped else "")

    def memory(self, step: Step, bench: Bench, free: int) -> dict[str, int] | None:
        """The model, and the answers that are generated at once."""
        for number, part in enumerate(self.parts):
            if part.pool is not None:
                answers, encoder = self._answers(bench)[part.pool], self._encoder(bench)
                rows = bench.rows.pool(step.phase, number, part.rows).rows
                together, each = answered_at_once(bench.model, answers.quantize, encoder, rows, answers.how(), free)
                return {**model_held(bench.model, answers.quantize), "cache": together * each}
        return None

    def written(self, step: Step, bench: Bench, planned: Planned | None) -> int:
        """The rows, and the answers they are drawn from."""
        new = sum(map(len, bench.rows.phase(step.phase, self.beside).rows))
        longest = max((how.max_new_tokens for how in self._answers(bench).values()), default=0)
        each = RECORD + TEXT * (self.limits.max_length // 2 + longest)
        return 2 * rounded(replay_amount(self._asked(None), new)) * each

    def _answers(self, bench: Bench) -> dict[str, Answers]:
        return {part.pool: cast("Answers", bench.steps[part.pool].work) for part in self.parts if part.pool}

    def _encoder(self, bench: Bench) -> Encoder:
        return bench.rows.encoder(kept_alive(self.limits, self.replay_system))

    def _asked(self, how: Answers | None) -> Replay:
        """The replay as these settings have it."""
        mix = [ReplayPart.model_construct(kind=part.kind, weight=part.weight, phase=part.phase) for part in self.parts]
        sampling = {key: getattr(how, key) for key in ("max_new_tokens", "temperature", "top_p")} if how else {}
        filters = self.filters or Filters()
        amount: dict[str, Any] = {"ratio": self.ratio, "unit": self.unit, "on_shortfall": self.on_shortfall}
        return Replay.model_construct(mix=mix, filters=filters, **amount, **sampling)
