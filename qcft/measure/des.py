"""Dataset embedding similarity (DES): how similar the instructions of two data sets are, with a bootstrap interval.

DES(A, B) is the cosine of the mean embeddings of A's and of B's instructions, "the normalized dot product" of arXiv
2410.16006, which uses LaBSE's embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 1000
# The data of the paper's "Instruct" models is not public, and the paper does not say what it uses instead. What qcft
# uses for an instruct model that serves as phase 1 unmodified: `instruct_side` in similarity.py.
PAPER = {"Alpaca - MultiAlpaca": 0.924, "Instruct - MultiAlpaca": 0.746}  # without forgetting, with forgetting


@dataclass(frozen=True)
class Similarity:
    """A cosine with its 95% interval over rows."""

    value: float
    low: float
    high: float
    rows: tuple[int, int]


class EmbeddingSums:
    """Running sums of embeddings: the plain sum and those of 1,000 Poisson resamples, so that no embedding is stored.

    In a Poisson bootstrap each row counts Poisson(1) times in a resample, independently of the others: the same as
    drawing rows with replacement, but for a number of rows that is not fixed. The cosine does not depend on a sum's
    length.
    """

    def __init__(self, sums: np.ndarray, rows: int) -> None:
        self.sums = sums
        self.rows = rows

    @classmethod
    def empty(cls, width: int) -> EmbeddingSums:
        """Sums over zero rows, in fp64, of shape (1 + resamples, width)."""
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
    the mean of few rows deviates from that of all rows by its noise, which lowers the cosine in the resamples as much
    as it did in the sample.
    """
    import numpy as np

    with np.errstate(invalid="ignore"):  # a resample may be empty where there are very few rows
        cosines = (a.sums * b.sums).sum(axis=1) / (np.linalg.norm(a.sums, axis=1) * np.linalg.norm(b.sums, axis=1))
    value = float(cosines[0])
    low, high = np.nanpercentile(cosines[1:], [2.5, 97.5])
    return Similarity(value, float(min(1.0, 2 * value - high)), float(min(1.0, 2 * value - low)), (a.rows, b.rows))
