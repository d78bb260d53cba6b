"""Backward transfer, forgetting, paired intervals, SQuAD's scores and ROUGE-L against independent computations."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcft.measure.continual import RESAMPLES, backward_transfer, forgetting, paired_change
from qcft.measure.rouge import rouge_l, words
from qcft.measure.squad import compute_exact, compute_f1

VALUES = st.floats(-5, 5)


@st.composite
def matrices(draw):
    size = draw(st.integers(2, 6))
    return draw(st.lists(st.lists(VALUES, min_size=size, max_size=size), min_size=size, max_size=size))


@settings(deadline=None)  # libraries load in the first example
@given(matrices())
def test_backward_transfer_and_forgetting_are_the_papers(results):
    r = np.array(results)
    last = len(r) - 1
    assert backward_transfer(results) == pytest.approx(np.mean(r[last, :last] - np.diag(r)[:last]), abs=1e-12)
    best = np.array([r[j:last, j].max() for j in range(last)])
    assert forgetting(results) == pytest.approx(np.mean(best - r[last, :last]), abs=1e-12)
    if last == 1:
        assert forgetting(results) == pytest.approx(-backward_transfer(results))


def test_one_phase_has_nothing_to_forget():
    with pytest.raises(ValueError, match="1 phases"):
        backward_transfer([[1.0]])


def test_losing_what_was_learned_is_negative_transfer_and_positive_forgetting():
    results = [[0.9, 0.1, 0.1], [0.7, 0.8, 0.1], [0.5, 0.9, 0.7]]
    assert backward_transfer(results) == pytest.approx((-0.4 + 0.1) / 2)
    assert forgetting(results) == pytest.approx((0.4 - 0.1) / 2)


def test_the_interval_is_that_of_a_bootstrap_by_scipy():
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(1)
    before, after = generator.random(80), generator.random(80) + 0.1
    found = paired_change([before], [after])
    theirs = stats.bootstrap(
        (after - before,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert found.value == pytest.approx((after - before).mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    assert found.items == 80


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        before = generator.random(60)
        after = before + generator.normal(0.2, 0.5, 60)
        found = paired_change([before], [after])
        hits += found.low <= 0.2 <= found.high
    assert 0.90 <= hits / 200 <= 0.985


@settings(deadline=None)  # libraries load in the first example
@given(st.lists(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=20), min_size=1, max_size=4))
def test_an_average_weights_tasks_not_items(tasks):
    before, after = ([[pair[i] for pair in task] for task in tasks] for i in (0, 1))
    found = paired_change(before, after, [1 / len(tasks)] * len(tasks))
    wanted = np.mean([np.mean(b) - np.mean(a) for a, b in zip(before, after, strict=True)])
    assert found.value == pytest.approx(wanted, abs=1e-9)
    assert found.low - 1e-9 <= found.high
    turned = paired_change(after, before, [1 / len(tasks)] * len(tasks))
    assert turned.value == pytest.approx(-found.value)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=1e-9)


def test_no_change_is_not_clear_and_a_sure_one_is():
    assert not paired_change([[0, 1, 1, 0]], [[0, 1, 1, 0]]).is_clear
    assert paired_change([[0.0] * 30], [[1.0] * 30]).is_clear
    assert RESAMPLES >= 1000


@pytest.mark.parametrize(
    ("gold", "answer", "exact", "f1"),
    [
        ("the Cat", "cat!", 1, 1.0),
        ("red blue", "blue green", 0, 0.5),
        ("red", "", 0, 0.0),
        ("the", "a", 1, 1.0),
        ("red red blue", "red", 0, 0.5),
    ],
)
def test_squads_scores(gold, answer, exact, f1):
    assert compute_exact(gold, answer) == exact
    assert compute_f1(gold, answer) == pytest.approx(f1)


@settings(deadline=None)  # libraries load in the first example
@given(st.lists(st.sampled_from("abcd"), max_size=8), st.lists(st.sampled_from("abcd"), max_size=8))
def test_rouge_l_is_the_longest_common_subsequence(left, right):
    pytest.importorskip("rouge_score")
    table = collections.defaultdict(int)
    for i, x in enumerate(left):
        for j, y in enumerate(right):
            table[i, j] = table[i - 1, j - 1] + 1 if x == y else max(table[i - 1, j], table[i, j - 1])
    same = table[len(left) - 1, len(right) - 1] if left and right else 0
    wanted = 2 * same / (len(left) + len(right)) if same else 0.0
    assert rouge_l(" ".join(left), " ".join(right), "xx") == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("lang", "text", "found"),
    [
        ("es", "¡El niño comió!", ["el", "niño", "comió"]),
        ("ru", "Привет, Мир", ["привет", "мир"]),
        ("ar", "القطّ أحمر", ["القطّ", "أحمر"]),
        ("ja", "猫が走る。", ["猫", "が", "走る"]),
        ("th", "แมววิ่ง", ["แมว", "วิ่ง"]),
    ],
)
def test_words_in_every_script(lang, text, found):
    pytest.importorskip({"ja": "fugashi", "th": "pythainlp"}.get(lang, "regex"))
    assert words(text, lang) == found
