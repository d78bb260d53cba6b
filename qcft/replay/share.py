"""Replay's share of a phase's mix, in rows and in answer tokens: the ratio sets one, the other may differ a lot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from qcft.data.encode import EncodedSet
from qcft.recipe import Replay
from qcft.store.metrics import ReplayMetrics

APART = 2  # factor by which the two shares may differ without a warning


class ShareShown(TypedDict):
    """Replay's share of a phase's mix; None for values that are not known before it is generated."""

    ratio: float
    unit: str
    rows: int | None
    answer_tokens: int | None
    share_of_rows: float | None
    share_of_answer_tokens: float | None
    in_words: str


@dataclass(frozen=True)
class ReplayShare:
    """Replay's rows and answer tokens and the new ones, for an epoch; None if not known before it is generated.

    `ratio` and `unit` are the recipe's.
    """

    ratio: float
    unit: str
    rows: int | None
    answer_tokens: int | None
    new_rows: int
    new_answer_tokens: int

    @property
    def of_rows(self) -> float | None:
        """The share of the mix's rows."""
        return _share(self.rows, self.new_rows)

    @property
    def of_answer_tokens(self) -> float | None:
        """The share of the mix's answer tokens, which are the tokens with loss."""
        return _share(self.answer_tokens, self.new_answer_tokens)

    def in_words(self) -> str:
        """The ratio, and the share in both units."""
        shares = ((self.of_rows, "rows"), (self.of_answer_tokens, "answer tokens"))
        parts = [f"{share:.1%} of the {what}" for share, what in shares if share is not None]
        parts += [f"share of {what} known after generation" for share, what in shares if share is None]
        return f"replay {self.ratio:g} of {self.unit}: {', '.join(parts)}"

    def warning(self, phase: str) -> str | None:
        """The warning if the two shares are very different."""
        rows, tokens = self.of_rows, self.of_answer_tokens
        if not rows or not tokens or max(rows, tokens) <= APART * min(rows, tokens):
            return None
        longer = "longer" if tokens > rows else "shorter"
        other, what = ("tokens", "answer tokens") if self.unit == "rows" else ("rows", "rows")
        return (
            f"{phase}: replay is {rows:.1%} of the rows and {tokens:.1%} of the answer tokens, which bear the loss, "
            f"because its answers are {longer}; {phase}.replay.unit={other} (by --set, or in an arm) makes "
            f"{self.ratio:g} a share of the {what}"
        )

    def shown(self) -> ShareShown:
        """Plain data, to print or for --json."""
        return {
            "ratio": self.ratio,
            "unit": self.unit,
            "rows": self.rows,
            "answer_tokens": self.answer_tokens,
            "share_of_rows": self.of_rows,
            "share_of_answer_tokens": self.of_answer_tokens,
            "in_words": self.in_words(),
        }


def share_beside(replay: Replay, new: Sequence[EncodedSet], rows: int | None, answer_tokens: int | None) -> ReplayShare:
    """The share of this much replay beside the phase's own rows."""
    fresh = (sum(len(one.rows) for one in new), sum(one.answer_tokens for one in new))
    return ReplayShare(replay.ratio, replay.unit, rows, answer_tokens, *fresh)


def share_made(replay: Replay, new: Sequence[EncodedSet], metrics: ReplayMetrics) -> ReplayShare:
    """The share of finished replay, by the metrics of its step."""
    return share_beside(replay, new, metrics["rows"], metrics["answer_tokens"])


def _share(replay: int | None, new: int) -> float | None:
    return None if replay is None else replay / max(1, replay + new)
