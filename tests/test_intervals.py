"""Intervals hold the truth as often as they say, arms that are equal have no winner, and quantiles are scipy's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from qcft.measure.clusters import item_clusters, linked
from qcft.measure.continual import Items, paired_changes
from qcft.measure.intervals import Bounds, by_cluster, max_t, one_interval, ratio, with_seeds
from qcft.measure.score import RowScore
from qcft.measure.stats import all_pairs, changes, compare_arms, difference

TRIALS = 300


def interval(nll, tokens):
    value, influence = ratio(nll[:, None], tokens[:, None])
    return one_interval(influence[:, 0], tokens / tokens.sum()).around(float(value[0]))[:2]


def covered(draws):
    """How often the interval around the mean of a row of `draws` holds zero."""
    held = 0
    for row in draws:
        low, high = interval(row, np.ones(len(row)))
        held += low <= 0 <= high
    return held / len(draws)


@pytest.mark.parametrize(
    ("name", "rows", "least", "most"),
    [("normal", 16, 0.94, 0.96), ("gamma", 16, 0.93, 0.96), ("normal", 5, 0.94, 0.96), ("normal", 3, 0.94, 0.96)],
)
def test_an_interval_holds_the_truth_as_often_as_it_says(name, rows, least, most):
    generator = np.random.default_rng(7)
    shape = (4000, rows)
    draws = generator.standard_normal(shape) if name == "normal" else generator.gamma(2, 1, shape) - 2
    assert least <= covered(draws) <= most


def test_an_interval_of_a_ratio_holds_the_truth():
    """Rows of unlike lengths, whose NLL per token depends on their length."""
    generator = np.random.default_rng(8)
    held = 0
    for _ in range(2000):
        tokens = generator.integers(1, 40, 16).astype(float)
        nll = tokens * (0.1 + 0.2 * generator.standard_normal(16)) + generator.standard_normal(16)
        low, high = interval(nll, tokens)
        held += low <= 0.1 <= high
    assert 0.935 <= held / 2000 <= 0.96


def arms_of(generator, arms, seeds, rows, gap=0.0, spread=0.15, seed_noise=0.0075):
    """Each arm's change of NLL (arms x seeds x rows): rows differ by `spread`, correlated 0.8 between arms; every run
    by its seed's noise, more than a third of it the same for all arms. The first arm is better by `gap`."""
    shared = generator.normal(0, spread * 0.8**0.5, rows)
    own = generator.normal(0, spread * 0.2**0.5, (arms, 1, rows))
    noise = generator.normal(0, seed_noise, (arms, seeds, 1)) + generator.normal(0, seed_noise, (1, seeds, 1))
    found = shared + own + noise
    found[0] -= gap
    return found


def winners(rows, seeds=3, arms=6, **options):
    """How often the best arm is named as better than another, and how often that is the first."""
    generator = np.random.default_rng(9)
    named = first = 0
    for _ in range(TRIALS):
        scores = arms_of(generator, arms, seeds, rows, **options)
        values, bounds = compare_arms(list(scores), np.ones(rows), paired=True)
        if any(value - below > 0 or value + above < 0
               for value, below, above in zip(values, bounds.below, bounds.above, strict=True)):  # fmt: skip
            named += 1
            first += scores.mean(axis=(1, 2)).argmin() == 0
    return named / TRIALS, first / TRIALS


@pytest.mark.parametrize("options", [
    {"rows": 48}, {"rows": 16}, {"rows": 16, "seed_noise": 0.01, "spread": 0.1},
    {"rows": 48, "seeds": 2, "arms": 2, "seed_noise": 0.02},
])  # fmt: skip
def test_equal_arms_have_a_winner_in_at_most_five_of_a_hundred_ablations(options):
    assert winners(**options)[0] <= 0.05


def test_an_arm_that_is_better_by_a_twentieth_of_a_nat_is_named():
    assert winners(48, gap=0.05)[1] >= 0.8


def test_two_runs_of_one_arm_are_not_distinguished_where_seeds_are_measured():
    """Rows that agree on a small difference distinguish two runs; with the noise of the seeds it is not clear."""
    generator = np.random.default_rng(3)
    shared = generator.normal(0, 0.15, 48)
    runs = [shared + generator.normal(0, 0.005, 48) + shift for shift in (0.0, 0.01, 0.012, -0.002)]
    scores = [[RowScore(float(nll), 1, 0) for nll in run] for run in runs]
    alone = all_pairs({"a": {0: scores[0]}, "b": {0: scores[1]}})["a", "b"]
    assert alone.is_clear
    assert alone.seeds == 1
    both = all_pairs({"a": {0: scores[0], 1: scores[1]}, "b": {0: scores[2], 1: scores[3]}})["a", "b"]
    assert not both.is_clear
    assert (both.seeds, both.compared, both.method) == (2, 1, "bootstrap-t over rows, Student's t over seeds (1 df)")


def test_what_a_seed_does_to_all_arms_is_not_noise_where_they_are_paired():
    means = [np.array([0.0, 0.5, -0.5]), np.array([0.1, 0.61, -0.41])]
    none = Bounds(np.zeros(1), np.zeros(1), "")
    contrast = np.array([[-1.0, 1.0]])
    paired, apart = (float(with_seeds(none, means, contrast, paired=p).below[0]) for p in (True, False))
    found = stats.ttest_rel(means[1], means[0]).confidence_interval(0.95)
    assert 2 * paired == pytest.approx(found.high - found.low, rel=0.03)
    found = stats.ttest_ind(means[1], means[0]).confidence_interval(0.95)
    assert 2 * apart == pytest.approx(found.high - found.low, rel=0.03)


@pytest.mark.parametrize("arms", [2, 3, 6])
@pytest.mark.parametrize("freedom", [1, 2, 10, 200])
def test_the_factor_of_all_pairs_is_that_of_tukey(arms, freedom):
    pairs = [(i, j) for i in range(arms) for j in range(i)]
    roots = np.zeros((arms, len(pairs)))
    for at, (i, j) in enumerate(pairs):
        roots[i, at], roots[j, at] = 1, -1
    wanted = stats.studentized_range.ppf(0.95, arms, freedom) / 2**0.5
    assert max_t(roots, freedom, pooled=True) == pytest.approx(wanted, rel=0.05 if freedom < 3 else 0.02)


@pytest.mark.parametrize("freedom", [1, 2, 15, 500])
def test_the_factor_of_one_estimate_is_students(freedom):
    assert max_t(np.ones((3, 1)), freedom, pooled=False) == pytest.approx(stats.t.ppf(0.975, freedom), rel=0.015)


@pytest.mark.parametrize("freedom", [0, -1])
def test_no_degree_of_freedom_is_refused(freedom):
    with pytest.raises(ValueError, match="degrees of freedom"):
        max_t(np.ones((2, 2)), freedom, pooled=True)


def rows_of(nlls, keys=None):
    return [RowScore(float(nll), 1, 0, key) for nll, key in zip(nlls, keys or [""] * len(nlls), strict=True)]


def test_translations_of_one_row_are_one_observation():
    """Eight rows in four languages are as sure as eight rows, not as 32."""
    generator = np.random.default_rng(4)
    changed = generator.normal(0.1, 0.2, 8)
    before = [0.0] * 32
    keys = [f"row {i}" for i in range(8)] * 4
    once = difference(rows_of(before[:8]), rows_of(changed))
    often = difference(rows_of(before, keys), rows_of([*changed] * 4, keys))
    assert (often.value, often.low, often.high) == pytest.approx((once.value, once.low, once.high))
    assert (often.rows, often.clusters, once.clusters) == (32, 8, 8)
    apart = difference(rows_of(before), rows_of([*changed] * 4))
    assert apart.high - apart.low < 0.7 * (often.high - often.low)


@pytest.mark.parametrize(
    ("nlls", "low", "method"),
    [
        ([0.3], None, "no interval: fewer than two independent observations"),
        ([0.3, 0.3], None, "no interval: all observations are equal"),
        ([0.0, 0.0], 0.0, "Student's t"),
        ([0.3, 0.1], 0.2 - stats.t.ppf(0.975, 1) * 0.1, "Student's t"),
        ([0.3, 0.1, 0.2], 0.2 - stats.t.ppf(0.975, 2) * 0.1 / 3**0.5, "Student's t"),
        ([0.0] * 11 + [1.0], 1 / 12 - stats.t.ppf(0.975, 11) / 12, "Student's t"),
    ],
)
def test_few_rows(nlls, low, method):
    found = difference(rows_of([0.0] * len(nlls)), rows_of(nlls))
    assert found.value == pytest.approx(sum(nlls) / len(nlls))
    assert found.low == (low if low is None else pytest.approx(low, abs=0.02))
    assert found.method == method
    assert found.is_clear is False


def test_rows_that_are_not_the_same_are_refused():
    with pytest.raises(ValueError, match="different rows"):
        difference(rows_of([1.0, 2.0]), rows_of([1.0]))


def test_arms_with_one_run_have_intervals_over_rows_alone():
    generator = np.random.default_rng(5)
    arms = [({0: rows_of(generator.normal(size=20))}, {0: rows_of(generator.normal(size=20))}) for _ in range(2)]
    found = changes(arms)
    assert [(one.seeds, one.method) for one in found] == [(1, "bootstrap-t")] * 2
    assert found[1] == difference(arms[1][0][0], arms[1][1][0])


@pytest.mark.parametrize("tasks", [1, 6])
def test_a_star_is_as_rare_among_many_tasks_as_with_one(tasks):
    generator = np.random.default_rng(6)
    starred = 0
    for _ in range(200):
        scores = generator.choice([0.0, 1.0], size=(tasks, 2, 40))
        items = [Items(one[0], one[1], [(at, i) for i in range(40)]) for at, one in enumerate(scores)]
        starred += any(change.is_clear for change in paired_changes(items, [[1 / tasks] * tasks]))
    assert starred / 200 <= 0.075


def test_an_average_over_translations_is_not_more_certain_than_one_language():
    generator = np.random.default_rng(7)
    before, after = generator.random(50), generator.random(50)
    keys = [f"question {i}" for i in range(50)]
    same = paired_changes([Items(before, after, keys)] * 3, [[1 / 3] * 3])
    assert [one.high - one.low for one in same] == pytest.approx([same[0].high - same[0].low] * 4)
    assert (same[3].clusters, same[3].items) == (50, 150)
    apart = paired_changes([Items(before, after, [(n, key) for key in keys]) for n in range(3)], [[1 / 3] * 3])
    assert apart[3].high - apart[3].low < same[3].high - same[3].low


def test_a_task_of_one_item_has_no_interval_and_the_others_keep_theirs():
    generator = np.random.default_rng(8)
    one, many = Items([0.0], [1.0], ["a"]), Items(generator.random(20), generator.random(20), [*range(20)])
    found = paired_changes([one, many], [[0.5, 0.5]])
    assert [change.low is None for change in found] == [True, False, True]


def test_questions_on_one_text_and_translations_of_a_question_are_one_cluster():
    spanish = [{"context": c, "parallel": q} for c, q in (("x", "1"), ("x", "2"), ("y", "3"), ("z", "4"))]
    german = [{"context": c, "parallel": q} for c, q in (("v", "3"), ("w", "4"), ("w", "9"))]
    found = item_clusters({
        "mlqa_es_es": ("mlqa", spanish), "mlqa_de_de": ("mlqa", german), "hellaswag": ("hellaswag", [{}, {}]),
        "xcopa_it": ("xcopa", [{}, {}]), "xcopa_th": ("xcopa", [{}, {}, {}]),
    })  # fmt: skip
    a, b, c, d = found["mlqa_es_es"]
    assert a == b
    assert len({a, c, d}) == 3
    assert found["mlqa_de_de"] == [c, d, d]
    assert found["xcopa_it"] == found["xcopa_th"][:2]
    every = {cluster for clusters in found.values() for cluster in clusters}
    assert len(every) == 3 + 2 + 3


@given(st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=3), max_size=15))
def test_things_are_linked_that_share_a_label_directly_or_through_others(labels):
    found = linked(labels)
    groups = [{i} for i in range(len(labels))]
    for i, own in enumerate(labels):
        for j, other in enumerate(labels[:i]):
            if {*own} & {*other}:
                a, b = (next(g for g in groups if k in g) for k in (i, j))
                if a is not b:
                    groups.remove(b)
                    a |= b
    assert {frozenset(g) for g in groups} == {
        frozenset(i for i, number in enumerate(found) if number == one) for one in found
    }


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(-5, 5)), min_size=1, max_size=9))
def test_sums_by_cluster(rows):
    keys = [key for key, _ in rows]
    found = by_cluster(keys, np.array([[value] for _, value in rows]))
    wanted = [sum(v for k, v in rows if k == key) for key in dict.fromkeys(keys)]
    assert found[:, 0] == pytest.approx(np.array(wanted))
