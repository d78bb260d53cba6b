"""English and multilingual ability (EA, MA), arm by arm: which arm kept the most English for the most gain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qcft.measure.score import read_scores
from qcft.measure.stats import Difference, Runs, all_pairs, changes
from qcft.report.arms import ArmRuns, Evidence
from qcft.store.results import Stage

ENGLISH = "en"
NEAR = 0.9  # arms with at least this share of the largest gain compete for the most English
UNEQUAL = 0.05  # arms whose trained answer tokens differ by a larger share are not equally trained


def mean_of(groups: Iterable[Mapping[str, Any]]) -> float | None:
    """Mean NLL per answer token over groups of held-out rows; None without any."""
    groups = list(groups)
    tokens = sum(g["answer_tokens"] for g in groups)
    return sum(g["nll"] * g["answer_tokens"] for g in groups) / tokens if tokens else None


@dataclass(frozen=True)
class Standing:
    """An arm at its last stage: mean NLL per answer token of English and of the others, run by run; lower is better.

    The changes are means over the arm's runs, with 95% intervals over rows, and over seeds if any arm has several
    runs: `lost` (English) since each run's stage of `before`, `gained` (the others; below zero is a gain) since the
    base as it is loaded. `front`: no other arm is better at both. If English rows of a kind that no arm trains on are
    measured, English means those; then `lost_trained` is the change on the other English rows.
    """

    arm: ArmRuns
    english: tuple[float, ...]
    others: tuple[float, ...]
    lost: Difference
    gained: Difference
    before: tuple[Stage, ...]
    front: bool = False
    lost_trained: Difference | None = None

    @property
    def since(self) -> str:
        """The name of the stage that `lost` is relative to."""
        return self.before[0].name.removeprefix("eval/")

    @property
    def place(self) -> tuple[float, float]:
        """EA and MA, means over runs."""
        return _mean(self.english), _mean(self.others)


@dataclass(frozen=True)
class Verdict:
    """The arm with the best English among those `near` the largest gain; `behind`: how much higher the English NLL of
    the others near it is. `beyond`: of the arms that gained less, the one with the best English, if it is better than
    that of `best`; with its share of the largest gain, and its English NLL minus that of `best`.

    The intervals are those of `english_pairs`. `tested` is false if every arm has one run: then the differences between
    runs of one arm are not known, and no arm can be called the best.
    """

    best: Standing
    near: tuple[Standing, ...]
    behind: Mapping[str, Difference]
    beyond: tuple[Standing, float, Difference] | None
    tested: bool = True


def standings(arms: Sequence[ArmRuns]) -> tuple[Standing, ...]:
    """The arms that are measured after their last phase, on the rows that all of them were measured on."""
    done = [arm for arm in arms if all(run.last for run in arm.runs)]
    english, others, trained = common_groups(done)
    if not english or not others:
        return ()
    measured: list[tuple[ArmRuns, tuple[Stage, ...], list[Stage]]] = []
    for arm in done:
        before = tuple(stage for run in arm.runs if (stage := _before(run, done)))
        base = [stage for run in arm.runs if (stage := run.run.stages.get("eval/base"))]
        if not len(before) == len(base) == len(arm.runs):
            continue
        if len({stage.name for stage in before}) > 1:
            before = tuple(base)
        measured.append((arm, before, base))
    if not measured:
        return ()
    lost = changes([(_scores(arm, since, english), _last(arm, english)) for arm, since, _ in measured])
    gained = changes([(_scores(arm, base, others), _last(arm, others)) for arm, _, base in measured])
    also: Sequence[Difference | None] = [None] * len(measured)
    if trained:
        also = changes([(_scores(arm, since, trained), _last(arm, trained)) for arm, since, _ in measured])
    found = [
        Standing(
            arm,
            tuple(_level(run, english) for run in arm.runs),
            tuple(_level(run, others) for run in arm.runs),
            less,
            more,
            before,
            lost_trained=less_trained,
        )
        for (arm, before, _), less, more, less_trained in zip(measured, lost, gained, also, strict=True)
    ]
    best = front({s.arm.name: s.place for s in found})
    return tuple(replace(s, front=s.arm.name in best) for s in found)


def front(places: Mapping[str, tuple[float, ...]]) -> set[str]:
    """The Pareto front: those for which no other is at most equal in every value, and lower in one."""
    return {
        name
        for name, place in places.items()
        if not any(
            other != place and all(a <= b for a, b in zip(other, place, strict=True)) for other in places.values()
        )
    }


def verdict(found: Sequence[Standing]) -> Verdict | None:
    """Which arm kept the most English for the most gain; None where nothing was gained."""
    most = max((-s.gained.value for s in found), default=0.0)
    if most <= 0:
        return None
    near = tuple(s for s in found if -s.gained.value >= NEAR * most)
    best = min(near, key=lambda s: s.place)
    pairs = english_pairs(found)
    behind = {s.arm.name: pairs[best.arm.name, s.arm.name] for s in near if s is not best}
    tested = any(len(s.english) > 1 for s in found)
    far = min((s for s in found if s not in near), key=lambda s: s.place, default=None)
    if far is None or far.place[0] >= best.place[0]:
        return Verdict(best, near, behind, None, tested)
    less = pairs[best.arm.name, far.arm.name]
    return Verdict(best, near, behind, (far, -far.gained.value / most, less), tested)


def english_pairs(found: Sequence[Standing]) -> dict[tuple[str, str], Difference]:
    """The English NLL of the second arm minus that of the first, for all pairs of arms; simultaneous intervals."""
    english = common_groups([s.arm for s in found]).english
    return all_pairs({s.arm.name: _last(s.arm, english) for s in found}) if len(found) > 1 else {}


def answer_tokens(arm: ArmRuns) -> float:
    """The answer tokens that an arm's phases were trained on, over all epochs; the mean over its runs."""
    fed = [source for run in arm.runs for training in run.run.trainings() for source in training["exposure"]]
    return sum(source["answer_tokens"] for source in fed) / len(arm.runs)


def unequal_training(best: ArmRuns, others: Sequence[ArmRuns]) -> dict[str, float]:
    """How many more answer tokens `best` was trained on than each of the others (0.42: 42% more), if the two differ by
    more than 5%."""
    own = answer_tokens(best)
    shares = {arm.name: own / tokens - 1 for arm in others if (tokens := answer_tokens(arm))}
    return {name: share for name, share in shares.items() if abs(share) > UNEQUAL}


class NamedGroups(NamedTuple):
    """Names of held-out groups: the English ones that arms are compared on, those of other languages, and, if the first
    have rows unlike those trained on, the other English ones."""

    english: list[str]
    others: list[str]
    trained: list[str]


def common_groups(arms: Sequence[ArmRuns]) -> NamedGroups:
    """The groups whose rows, and their tokens, are the same at every arm's last stage.

    An arm that trains on more rows of the first phase, by replay or mixed, is better on rows like them. So arms are
    compared on English rows of a kind that none trains on, if such rows are measured.
    """
    seen = [
        {name: [(row.key, row.tokens) for row in rows] for name, rows in read_scores(run.last.opened).items()}
        for arm in arms
        for run in arm.runs
        if run.last
    ]
    if not seen:
        return NamedGroups([], [], [])
    names = [name for name, rows in seen[0].items() if all(other.get(name) == rows for other in seen)]
    of = {g["name"]: g for g in arms[0].runs[0].run.table["groups"]}
    english = [name for name in names if of[name]["lang"] == ENGLISH]
    others = [name for name in names if of[name]["lang"] != ENGLISH]
    untrained = [name for name in english if not of[name]["trained"]]
    trained = [name for name in english if name not in untrained]
    return NamedGroups(untrained, others, trained) if untrained else NamedGroups(english, others, [])


def _level(run: Evidence, groups: Sequence[str]) -> float:
    assert run.last is not None
    mean = mean_of(run.last.metrics["groups"][name] for name in groups)
    assert mean is not None
    return mean


def _before(run: Evidence, arms: Sequence[ArmRuns]) -> Stage | None:
    """The measurement that a run's English is compared with: after its first phase, or with one phase only, the base.

    A mixed run, which trains on the data of the first phase of other runs together with the rest, is compared with the
    first phase of those with its base and its seed, if they share it.
    """
    stages, phases = run.run.stages, run.recipe.phases
    base = stages.get("eval/base")
    if len(phases) > 1:
        return stages.get(f"eval/{phases[0].name}")
    shared = {
        stage.step: stage
        for other in (other for arm in arms for other in arm.runs)
        if other.recipe.seed == run.recipe.seed and len(other.recipe.phases) > 1 and base
        if other.recipe.phases[0].data and all(source in phases[0].data for source in other.recipe.phases[0].data)
        if (also := other.run.stages.get("eval/base")) and also.step == base.step
        if (stage := other.run.stages.get(f"eval/{other.recipe.phases[0].name}"))
    }
    return next(iter(shared.values())) if len(shared) == 1 else base


def _last(arm: ArmRuns, groups: Sequence[str]) -> Runs:
    return _scores(arm, [run.last for run in arm.runs if run.last], groups)


def _scores(arm: ArmRuns, stages: Sequence[Stage], groups: Sequence[str]) -> Runs:
    """The scores of the groups' rows by seed, at one stage of each of the arm's runs."""
    found = {}
    for run, stage in zip(arm.runs, stages, strict=True):
        scores = read_scores(stage.opened)
        found[run.recipe.seed] = [score for name in groups for score in scores[name]]
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
