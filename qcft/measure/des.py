"""Dataset embedding similarity (DES): how alike the instructions of two data sets are, with a bootstrap interval.

DES(A, B) is the cosine of the mean embeddings of A's and of B's instructions, "the normalized dot product" of arXiv
2410.16006, which takes LaBSE's embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 1000
# The data of the paper's "Instruct" models is not public, and what it takes for it was not found. What qcft takes for a
# model that is phase 1 as it came: `instruct_side` in similarity.py.
PAPER = {"Alpaca - MultiAlpaca": 0.924, "Instruct - MultiAlpaca": 0.746}  # similar: no forgetting; not: forgetting


@dataclass(frozen=True)
class Similarity:
    """A cosine with its 95% interval over rows."""

    value: float
    low: float
    high: float
    rows: tuple[int, int]


class EmbeddingSums:
    """Running sums of embeddings: the plain sum and those of 1,000 Poisson resamples, so that no embedding is kept.

    In a Poisson bootstrap each row counts Poisson(1) times in a resample, independently of the others, which is what
    drawing rows with replacement comes to when their number is not fixed; the cosine does not see how long a sum is.
    """

    def __init__(self, sums: np.ndarray, rows: int) -> None:
        self.sums = sums
        self.rows = rows

    @classmethod
    def empty(cls, width: int) -> EmbeddingSums:
        """Sums of no rows yet, in fp64, of shape (1 + resamples, width)."""
        import numpy as np

        return cls(np.zeros((1 + RESAMPLES, width)), 0)

    def add(self, embeddings: np.ndarray, draws: np.random.Generator) -> None:
        """Add embeddings of shape (rows, width)."""
        import numpy as np

        counts = draws.poisson(1.0, size=(len(embeddings), RESAMPLES)).T
        weights = np.concatenate([np.ones((1, len(embeddings))), counts])
        self.sums += weights @ embeddings.astype(np.float64)
        self.rows += len(embeddings)

    def __add__(self, other: EmbeddingSums) -> EmbeddingSums:
        return EmbeddingSums(self.sums + other.sums, self.rows + other.rows)


def similarity(a: EmbeddingSums, b: EmbeddingSums) -> Similarity:
    """DES of two data sets.

    The interval is the basic bootstrap's (Davison & Hinkley 1997, eq. 5.6), 2 DES minus the resamples' percentiles:
    the mean of few rows points away from that of all by its noise, which lowers the cosine in the resamples as much as
    it did in the sample.
    """
    import numpy as np

    with np.errstate(invalid="ignore"):  # a resample of nothing, where rows are very few
        cosines = (a.sums * b.sums).sum(axis=1) / (np.linalg.norm(a.sums, axis=1) * np.linalg.norm(b.sums, axis=1))
    value = float(cosines[0])
    low, high = np.nanpercentile(cosines[1:], [2.5, 97.5])
    return Similarity(value, float(min(1.0, 2 * value - high)), float(min(1.0, 2 * value - low)), (a.rows, b.rows))
