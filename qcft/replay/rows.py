"""Makes a phase's replay rows: an exact number of each kind, in rows or answer tokens, drawn from its pool."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NotRequired, TypedDict

from qcft.data.encode import EncodedRow, EncodedSet, Encoder
from qcft.data.filters import AnswerFilter, known_languages
from qcft.data.rows import Message, Row, message_from
from qcft.errors import InputError, QcftError, nearest
from qcft.events import Watch
from qcft.files import read_json_lines, write_text
from qcft.recipe import Phase, Replay
from qcft.replay.amount import repeated, replay_amount, rounded, split_amount, take_amount
from qcft.replay.generation import Generated, Generation
from qcft.replay.pools import Pool
from qcft.replay.share import ReplayShare, share_beside
from qcft.store.metrics import CutAnswers, ReplayedPart, ReplayMetrics
from qcft.words import counted

FILE, LEFT_OUT = "replay.jsonl", "left_out.jsonl"


class Provenance(TypedDict):
    """The origin of a replayed row: the kind of replay, and more."""

    kind: str


class ReplaySample(TypedDict):
    """A line of `replay.jsonl`, or of `left_out.jsonl`, which has the `reason`."""

    prompt: list[dict[str, str]]
    completion: list[dict[str, str]]
    provenance: Provenance
    reason: NotRequired[str]


class ReplayShown(ReplayMetrics):
    """What `qcft replay` shows: a replay step's metrics, its file, and samples from it."""

    run: str
    stage: str
    file: str
    samples: list[ReplaySample]


@dataclass(frozen=True)
class Candidate:
    """A row that can be replayed, the number of training rows it gives, its tokens with loss, and its origin."""

    row: Row
    rows: int
    answer_tokens: int
    provenance: dict[str, object]


@dataclass
class Drawing:
    """Draws from one pool; counts and keeps the dropped rows."""

    pool: Pool
    encoder: Encoder
    seen: set[str]  # in all pools of the phase, so that no row is drawn twice
    left_out: Counter[str] = field(default_factory=Counter)
    aside: list[dict[str, object]] = field(default_factory=list)

    def rows(self) -> Iterator[Candidate]:
        """The pool's rows, unmodified."""
        for row in self.pool.rows:
            encoded = self.encoder.encode(row)
            identity = f"{row.prompt_digest} {[m.content for m in row.completion]}"
            if isinstance(encoded, str):
                self.drop(row, encoded)
            elif identity in self.seen:
                self.drop(row, "drawn as another kind")
            else:
                self.seen.add(identity)
                yield Candidate(row, *_size(encoded), self.kind() | {"prompt": _short(row)})

    def answers(self, generated: Iterator[Generated], replay: Replay, model: str, pool_id: str) -> Iterator[Candidate]:
        """The answers that pass the filters."""
        filters = replay.filters
        if self.pool.language is not None and filters.language is not None:
            language = self.pool.language.split("-")[0]
            filters = filters.model_copy(update={"language": language if language in known_languages() else None})
        keep = AnswerFilter(filters)
        settings = {key: getattr(replay, key) for key in ("max_new_tokens", "temperature", "top_p")}
        for answer in generated:
            if answer.skipped is not None:
                self.drop(answer.row, answer.skipped)
                continue
            # A truncated answer may end in a partial character, which is decoded as U+FFFD.
            text = answer.text if answer.finished else answer.text.rstrip("\ufffd").rstrip()
            given = Message("assistant", text, finished=answer.finished)
            row = Row(answer.row.prompt, (given,), answer.row.id)
            reason = keep.reason(text, answer.finished)
            encoded = self.encoder.encode(row) if reason is None else reason
            if isinstance(encoded, str):
                self.drop(row, encoded)
                continue
            provenance = {
                **self.kind(),
                "prompt": _short(row),
                "model": model,
                "pool": pool_id,
                "chunk": answer.chunk,
                "seed": answer.seed,
                **settings,
            }
            yield Candidate(row, *_size(encoded), provenance)

    def drop(self, row: Row, reason: str) -> None:
        """Count a dropped row, and keep it for `left_out.jsonl`."""
        self.left_out[reason] += 1
        self.aside.append(row.as_dict() | {"reason": reason, "provenance": self.kind()})

    def kind(self) -> dict[str, object]:
        """The kind of the rows, and the earlier phase if one is named."""
        part = self.pool.part
        return {"kind": part.kind, **({"phase": part.phase} if part.phase else {})}


def weigher(replay: Replay) -> Callable[[Candidate], int]:
    """A function for the size of a row in the replay's unit."""
    return (lambda candidate: candidate.rows) if replay.unit == "rows" else (lambda candidate: candidate.answer_tokens)


def wanted(replay: Replay, new: Sequence[EncodedSet]) -> list[Fraction]:
    """How much replay of each kind is needed for the ratio beside the new rows, in the replay's unit."""
    return split_amount(replay_amount(replay, _new(replay, new)), [part.weight for part in replay.parts()])


def check_replay(phase: Phase, pools: Sequence[Pool], new: Sequence[EncodedSet], encoder: Encoder) -> ReplayShare:
    """Check before any weights are loaded that the pools can be large enough. Returns replay's share, as far as it is
    known before answers are generated. Raises InputError."""
    replay = phase.replay
    assert replay is not None
    language = replay.filters.language
    generative = any(part.kind == "generative" for part in replay.parts())
    if generative and language is not None and language.split("-")[0] not in known_languages():
        raise InputError(
            f"{phase.name}.replay.filters.language: {language!r} is not a language that can be identified",
            nearest(language, sorted(known_languages())) + "give a code such as en, or null to keep every language",
        )
    weigh, seen = weigher(replay), set[str]()
    drawn: list[Candidate] = []
    for pool, amount in zip(pools, wanted(replay, new), strict=True):
        drawing = Drawing(pool, encoder, seen)
        if pool.part.kind == "generative":
            have, missing = _askable(drawing, amount, replay)
        else:
            rows, missing = take_amount(drawing.rows(), amount, weigh)
            have = sum(map(weigh, rows))
            drawn += rows + (repeated(rows, missing, weigh) if replay.on_shortfall == "repeat" else [])
            if len(pools) > 1 and missing <= max(map(weigh, rows), default=0):
                missing = Fraction(0)  # rounding in the other kinds may make up for it
        if not have and amount > 0:
            raise InputError(
                f"replay: none of the {len(pool.rows)} rows can be used ({pool.reason}): {_counts(drawing.left_out)}",
                f"raise {phase.name}.train.max_length, or name others in {phase.name}.replay.data",
            )
        if missing and replay.on_shortfall == "error":
            raise InputError(_shortfall(replay, new, amount, have, pool, drawing.left_out), _hint(phase.name))
    if not generative:
        return share_beside(replay, new, sum(one.rows for one in drawn), sum(one.answer_tokens for one in drawn))
    asked = rounded(replay_amount(replay, _new(replay, new)))
    return share_beside(replay, new, *((asked, None) if replay.unit == "rows" else (None, asked)))


def make_replay(
    phase: str,
    replay: Replay,
    pools: Sequence[Pool],
    new: Sequence[EncodedSet],
    encoder: Encoder,
    generations: Sequence[tuple[Generation, str, str] | None],
    folder: Path,
    watch: Watch,
) -> ReplayMetrics:
    """Draw the replay rows into `folder/replay.jsonl`, and the dropped ones into `left_out.jsonl`; returns metrics.

    `generations` has, for each generated kind, the source of its answers, the model's name and the pool's id. Raises
    QcftError if there are too few rows and `on_shortfall` is `error`.
    """
    weigh, seen, carry = weigher(replay), set[str](), Fraction(0)
    chosen: list[Candidate] = []
    aside: list[dict[str, object]] = []
    parts: list[ReplayedPart] = []
    for pool, share, generation in zip(pools, wanted(replay, new), generations, strict=True):
        amount = share + carry  # so that rounding errors of the parts do not add up
        drawing = Drawing(pool, encoder, seen)
        if generation:
            shown = _Progress(generation[0], drawing, amount, replay, watch)
            candidates = shown.counted(drawing.answers(generation[0].draw(shown.pace), replay, *generation[1:]), weigh)
        else:
            candidates = drawing.rows()
        rows, missing = take_amount(candidates, amount, weigh)
        again = repeated(rows, missing, weigh) if replay.on_shortfall == "repeat" else []
        have = sum(map(weigh, rows))
        if missing and (replay.on_shortfall == "error" or not rows):
            raise QcftError(_shortfall(replay, new, amount, have, pool, drawing.left_out), _hint(phase))
        if missing:
            what = f"{counted(len(again), 'row')} repeated" if again else "the share is smaller"
            watch.note(f"replay: {rounded(missing)} {_unit(replay)} too few ({pool.reason}): {what}", "warning")
        carry = (
            amount - have - sum(map(weigh, again)) if replay.on_shortfall != "shrink" or not missing else Fraction(0)
        )
        chosen += rows + again
        aside += drawing.aside
        parts.append(
            {
                "kind": pool.part.kind,
                "rows": len(rows) + len(again),
                "answer_tokens": sum(c.answer_tokens for c in rows + again),
                "cut": _cut(rows + again),
                "repeated": len(again),
                "missing": rounded(missing) if missing else 0,
                "reason": pool.reason,
                "pool": len(pool.rows),
                "left_out": dict(Counter(pool.left_out) + drawing.left_out),
                "generation": generation[0].summary() if generation else None,
            }
        )
    _write(
        folder / FILE,
        [c.row.as_dict() | {"answer_tokens": c.answer_tokens, "provenance": c.provenance} for c in chosen],
    )
    _write(folder / LEFT_OUT, aside)
    rows_made, tokens = sum(c.rows for c in chosen), sum(c.answer_tokens for c in chosen)
    made = share_beside(replay, new, rows_made, tokens)
    if any(generations) and (warning := made.warning(phase)):  # for other rows it is given before any work
        watch.note(warning, "warning")
    return {
        "rows": rows_made,
        "answer_tokens": tokens,
        "share_of_rows": made.of_rows or 0.0,
        "share_of_answer_tokens": made.of_answer_tokens or 0.0,
        "reason": "; ".join(part["reason"] for part in parts),
        "left_out": dict(sum((Counter(part["left_out"]) for part in parts), Counter[str]())),
        "parts": parts,
    }


def read_replay(file: Path) -> list[tuple[Row, str]]:
    """The rows of a replay file, each with its kind, and the earlier phase if one was named."""
    rows = []
    for record in read_json_lines(file):
        prompt, completion = (tuple(map(message_from, record[part])) for part in ("prompt", "completion"))
        kind, phase = record["provenance"]["kind"], record["provenance"].get("phase")
        rows.append((Row(prompt, completion, record.get("id")), f"{kind}, {phase}" if phase else str(kind)))
    return rows


class _Progress:
    """Reports the progress of generation, and an estimate of the remaining time once it is known."""

    def __init__(
        self, generation: Generation, drawing: Drawing, amount: Fraction, replay: Replay, watch: Watch
    ) -> None:
        self.generation = generation
        self.drawing = drawing
        self.amount = amount
        self.unit = "answers" if replay.unit == "rows" else "answer tokens"
        self.watch = watch
        self.have = 0
        self.estimated = False

    def pace(self, tokens_per_second: float) -> None:
        """Report progress; called every few tokens."""
        made = self.generation.made + self.generation.reused
        if made and not self.estimated:
            self.estimated = True
            self._estimate()
        out = sum(self.drawing.left_out.values())
        speed = f"{tokens_per_second:,.0f} tokens/s"
        done, total = min(float(self.have), float(self.amount)), math.ceil(self.amount)
        self.watch.progress("generating replay", done, total, self.unit, speed=speed, out=f"{out} dropped")

    def counted(self, candidates: Iterator[Candidate], weigh: Callable[[Candidate], int]) -> Iterator[Candidate]:
        """The candidates, while counting them."""
        for candidate in candidates:
            self.have += weigh(candidate)
            yield candidate

    def _estimate(self) -> None:
        made = self.generation
        if not self.have or not made.seconds:
            return
        answers = float(self.amount - self.have) / (self.have / max(1, made.answers))
        tokens = answers * made.tokens / max(1, made.answers)
        self.watch.note(
            f"replay: about {answers:,.0f} more answers, {tokens:,.0f} tokens, "
            f"{tokens * made.seconds / max(1, made.tokens) / 60:.1f} min to generate "
            f"(from {made.answers} answers at {made.tokens / made.seconds:,.0f} tokens/s, batches of {made._batch})"
        )


def _askable(drawing: Drawing, amount: Fraction, replay: Replay) -> tuple[int, Fraction]:
    """The most that the prompts can give, counted until it is enough; and how much is certainly missing."""
    each = 1 if replay.unit == "rows" else replay.max_new_tokens + 1
    have = 0
    for row in drawing.pool.rows:
        if have >= amount:
            break
        prompt = drawing.encoder.prompt(row)
        if isinstance(prompt, str):
            drawing.left_out[prompt] += 1
        else:
            have += each
    missing = amount - have
    return have, missing if missing * 2 >= each else Fraction(0)


def _new(replay: Replay, new: Sequence[EncodedSet]) -> int:
    return sum(len(s.rows) if replay.unit == "rows" else s.answer_tokens for s in new)


def _unit(replay: Replay) -> str:
    return "rows" if replay.unit == "rows" else "answer tokens"


def _shortfall(
    replay: Replay, new: Sequence[EncodedSet], amount: Fraction, have: int, pool: Pool, left_out: Counter[str]
) -> str:
    unit, needed = _unit(replay), max(rounded(amount), have + 1)
    why = f"; dropped: {_counts(left_out)}" if left_out else ""
    at_most = "at most" if pool.part.kind == "generative" and replay.unit == "tokens" else "only"
    return (
        f"replay: a ratio of {replay.ratio} with {_new(replay, new)} new {unit} needs {needed} replay {unit}"
        + (f" of kind {pool.part.kind}" if len(replay.mix) > 1 else "")
        + f", but {at_most} {have} can be made ({pool.reason}{why})"
    )


def _hint(phase: str) -> str:
    name = f"{phase}.replay"
    return f"lower {name}.ratio, add rows with {name}.data, or set {name}.on_shortfall to repeat or shrink"


def _counts(left_out: Counter[str]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in left_out.most_common())


def _size(encoded: Sequence[EncodedRow]) -> tuple[int, int]:
    return len(encoded), sum(one.answer_tokens for one in encoded)


def _cut(rows: Sequence[Candidate]) -> CutAnswers:
    """The rows whose answer is not finished, and their answer tokens."""
    cut = [one for one in rows if not one.row.completion[-1].finished]
    return {"rows": len(cut), "answer_tokens": sum(one.answer_tokens for one in cut)}


def _short(row: Row) -> str:
    return row.prompt_digest[:16]


def _write(file: Path, rows: list[dict[str, object]]) -> None:
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
