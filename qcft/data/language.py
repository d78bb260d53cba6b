"""Guesses the language of a source's rows, where the recipe does not name it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from qcft.data.filters import identified
from qcft.data.rows import Row

LOOKED_AT = 100  # rows
CLEAR = 0.6  # the share of rows in one language that makes it the source's


@dataclass(frozen=True)
class Guess:
    """The most common language of `rows` rows that are long enough to identify, `share` of them; None if not clear."""

    lang: str | None
    share: float
    rows: int


def guess_language(rows: Iterable[Row]) -> Guess:
    """Guess by py3langid from the first hundred rows, questions and answers together."""
    texts = ("\n".join(m.content for m in row.messages if m.role != "system") for row in islice(rows, LOOKED_AT))
    found = Counter(lang for text in texts if (lang := identified(text)) is not None)
    if not found:
        return Guess(None, 0.0, 0)
    lang, count = found.most_common(1)[0]
    share = count / found.total()
    return Guess(lang if share >= CLEAR and len(lang) == 2 else None, share, found.total())
