"""Intervals around means of few observations, from arrays. Pure.

An estimate is described by its influence values, one row for each cluster (rows that are not independent observations,
such as the translations of one row, are one cluster): their sum is zero, and the estimate's squared standard error is
n/(n-1) times the sum of their squares. An estimate that is a linear function of others has the same linear function of
their influence values, so averages of tasks, means over runs and differences between arms are all computed this way.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 2000
DRAWS = 10_000  # of a largest t whose variances are estimated one by one: its 95% quantile is accurate to about 1%
ALONE = 100_000  # of a t, or a largest t with one variance, whose quantile does not depend on data and is cached
FEWEST, MOST = 8, 1000  # clusters that are resampled: with fewer, resamples repeat; with more, the gain is negligible

BOOTSTRAP_T, STUDENT_T, MAX_T = "bootstrap-t", "Student's t", "max-t"
MANY = 100  # degrees of freedom from which the noise of each variance by itself no longer matters
NO_INTERVAL = "no interval: fewer than two independent observations"
NO_SPREAD = "no interval: all observations are equal"


@dataclass(frozen=True)
class Interval:
    """A value with its interval; without bounds, `method` gives the reason.

    `level` is how often such intervals contain the true value. `clusters` counts the independent observations behind
    the value, `seeds` the runs with different seeds whose noise the interval includes (1: that noise was not measured).
    `compared` counts the intervals that are simultaneous at this level; 1: this one alone.
    """

    value: float
    low: float | None
    high: float | None
    level: float = LEVEL
    clusters: int = 0
    seeds: int = 1
    method: str = BOOTSTRAP_T
    compared: int = 1

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero; false without an interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def half_width(self) -> float | None:
        """Half the interval's width: about the smallest difference from zero that could have been seen."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


@dataclass(frozen=True)
class Bounds:
    """How far the intervals of several estimates extend below and above them; not finite where there is none."""

    below: Array
    above: Array
    method: str

    def around(self, value: float, at: int = 0) -> tuple[float | None, float | None, str]:
        """The bounds around one of the values, and the method or the reason why there are no bounds."""
        below, above = float(self.below[at]), float(self.above[at])
        if below != below or above != above:  # NaN
            return None, None, NO_INTERVAL
        if below == above == 0 and value != 0:
            return None, None, NO_SPREAD
        return value - below, value + above, self.method


def by_cluster(keys: Sequence[Hashable], values: Array) -> Array:
    """Sums of `values` (observations x columns) over the observations that share a key, in order of appearance."""
    import numpy as np

    places: dict[Hashable, int] = {}
    index = [places.setdefault(key, len(places)) for key in keys]
    found = np.zeros((len(places), values.shape[1]))
    np.add.at(found, index, values)
    return found


def ratio(above: Array, below: Array) -> tuple[Array, Array]:
    """Ratios sum(above) / sum(below) of columns (clusters x columns), and their influence values.

    By linearisation of the ratio estimator (Cochran 1977, "Sampling Techniques", section 6.4).
    """
    values = above.sum(axis=0) / below.sum(axis=0)
    return values, (above - values * below) / below.sum(axis=0)


def one_interval(influence: Array, shares: Array) -> Bounds:
    """The interval of one ratio from its influence values and its clusters' shares of the divisor (a value each).

    Bootstrap-t, equal-tailed (Efron & Tibshirani 1993, "An Introduction to the Bootstrap", section 12.5): clusters are
    resampled, and each resample's ratio is divided by its own linearised standard error. The 2,000 resamples are always
    the same. With fewer than 8 clusters, more than 1,000, or resamples without spread: Student's t.
    """
    import numpy as np

    clusters = len(influence)
    scaled = influence * np.sqrt(clusters / max(clusters - 1, 1))
    plain = together(scaled[:, None], clusters - 1)
    if not FEWEST <= clusters <= MOST:
        return plain
    weights = _resamples(clusters)
    sums = weights @ scaled
    moved = sums / (weights @ shares)
    squares = weights @ scaled**2 - 2 * moved * (weights @ (scaled * shares)) + moved**2 * (weights @ shares**2)
    squares[squares < 1e-12 * (scaled**2).sum()] = 0  # rounding errors
    with np.errstate(divide="ignore", invalid="ignore"):
        studentised = sums / np.sqrt(squares)
    low, high = np.quantile(studentised, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if not (np.isfinite(low) and np.isfinite(high)):
        return plain
    error = np.sqrt((scaled**2).sum(keepdims=True))
    return Bounds(error * max(high, 0.0), error * max(-low, 0.0), BOOTSTRAP_T)


def together(scaled: Array, freedom: int) -> Bounds:
    """Simultaneous intervals of several estimates: the chance that any of them misses its true value is 5%.

    `scaled`: influence values (clusters x estimates), those of each estimate times sqrt(n/(n-1)), n its clusters;
    `freedom`: n - 1 of the estimate with the fewest clusters. The factor is the quantile of the largest absolute t of
    normal observations with the estimates' correlations (the "max-t" of Hothorn, Bretz & Westfall 2008,
    "Simultaneous inference in general parametric models", Biometrical Journal 50, section 4), by simulation with a
    fixed seed; for one estimate it is Student's t.
    """
    import numpy as np

    method = STUDENT_T if scaled.shape[1] == 1 else MAX_T
    errors = np.sqrt((scaled**2).sum(axis=0))
    reach = errors * (max_t(scaled, freedom, pooled=False) if freedom > 0 else np.nan)
    return Bounds(reach, reach, method)


def max_t(roots: Array, freedom: int, *, pooled: bool) -> float:
    """The 95% quantile of max_k |t_k| of estimates with correlations `roots.T @ roots`, columns scaled to length 1.

    `pooled`: all share one variance with these degrees of freedom, as in Tukey's range; else each has its own, from as
    many normal observations. Columns of zeros are ignored. Raises ValueError for fewer than 1 degree of freedom.
    """
    import numpy as np

    if freedom < 1:
        raise ValueError(f"{freedom} degrees of freedom")
    lengths = np.sqrt((roots**2).sum(axis=0))
    columns = roots[:, lengths > 0] / lengths[lengths > 0]
    if not columns.size:
        return 0.0
    if columns.shape[1] == 1:
        return _one_t(freedom)
    sizes, turned = np.linalg.eigh(columns.T @ columns)
    kept = sizes > 1e-10 * sizes[-1]
    columns = np.sqrt(sizes[kept])[:, None] * turned.T[kept]  # the same correlations from as few draws as possible
    if pooled or freedom > MANY:
        return _pooled_t(columns.tobytes(), columns.shape[1], freedom)
    normal, covariances = _draws(len(columns), freedom)
    products = (columns[:, None] * columns[None]).reshape(-1, columns.shape[1])
    largest: Array = ((normal @ columns) ** 2 / (covariances @ products)).max(axis=1)
    return float(np.sqrt(np.quantile(largest, LEVEL)))


def with_seeds(rows: Bounds, means: Sequence[Array], contrasts: Array, *, paired: bool) -> Bounds:
    """Intervals over rows, widened by the noise of seeds, which rows alone do not show.

    `means` holds each arm's means, run by run; `contrasts` (estimates x arms) the estimated functions of these means.
    The variance between the runs of an arm is pooled over all arms; with `paired`, runs with the same seed have the
    same position in all arms, and an effect that a seed has on all arms is not noise (contrasts must sum to zero). Its
    factor is the quantile of the studentised maximum over the contrasts with the pooled degrees of freedom: for all
    pairs of arms, Tukey's studentised range. Both parts are combined as the root of the sum of squares (MOVER: Zou &
    Donner 2008, "Construction of confidence limits about effect measures", Statistics in Medicine 27). The effect of
    seeds on single rows is in both parts, so intervals are too wide rather than too narrow.

    Raises ValueError where no arm has a second run.
    """
    import numpy as np

    runs = np.array([len(one) for one in means])
    if paired:
        table = np.array(means)
        left = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0, keepdims=True) + table.mean()
        freedom = (len(runs) - 1) * (int(runs[0]) - 1)
    else:
        left = np.concatenate([one - one.mean() for one in means])
        freedom = int((runs - 1).sum())
    roots = (contrasts / np.sqrt(runs)).T
    reach = max_t(roots, freedom, pooled=True) * np.sqrt((left**2).sum() / max(freedom, 1) * (roots**2).sum(axis=0))
    method = f"{rows.method} over rows, {MAX_T if len(contrasts) > 1 else STUDENT_T} over seeds ({freedom} df)"
    return Bounds(np.hypot(rows.below, reach), np.hypot(rows.above, reach), method)


@lru_cache(maxsize=8)
def _resamples(clusters: int) -> Array:
    """How often each resample draws each cluster: RESAMPLES x clusters."""
    import numpy as np

    drawn = np.random.default_rng(0).multinomial(clusters, np.full(clusters, 1 / clusters), size=RESAMPLES)
    return drawn.astype(np.float64)


@lru_cache
def _one_t(freedom: int) -> float:
    """The 95% quantile of |t|."""
    import numpy as np

    generator = np.random.default_rng(0)
    spread = np.sqrt(generator.chisquare(freedom, size=ALONE) / freedom)
    return float(np.quantile(np.abs(generator.standard_normal(ALONE) / spread), LEVEL))


@lru_cache
def _pooled_t(columns: bytes, width: int, freedom: int) -> float:
    """The 95% quantile of the largest |t| of `columns` (bytes, for the cache), which share one standard deviation."""
    import numpy as np

    generator = np.random.default_rng(0)
    roots = np.frombuffer(columns).reshape(-1, width)
    normal = generator.standard_normal((ALONE, len(roots)))
    largest = np.zeros(ALONE)
    for root in roots.T:
        np.maximum(largest, np.abs(normal @ root), out=largest)
    return float(np.quantile(largest / np.sqrt(generator.chisquare(freedom, size=ALONE) / freedom), LEVEL))


@lru_cache(maxsize=4)
def _draws(width: int, freedom: int) -> tuple[Array, Array]:
    """Draws of standard normal vectors (DRAWS x width), and of covariances of such vectors, estimated with `freedom`
    degrees of freedom (Wishart; DRAWS x width * width)."""
    import numpy as np

    generator = np.random.default_rng(0)
    normal = generator.standard_normal((DRAWS, width))
    found = np.zeros((DRAWS, width, width))
    for _ in range(freedom):
        one = generator.standard_normal((DRAWS, width))
        found += one[:, :, None] * one[:, None, :]
    return normal, found.reshape(DRAWS, -1) / freedom
