"""Scores agree with plain transformers; intervals and what a merge kept are right."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcft import QcftError
from qcft.data.encode import IGNORED, Encoder
from qcft.data.rows import Message, Row
from qcft.events import Watch
from qcft.measure.score import RowScore, score_rows
from qcft.measure.stats import accuracy, difference, kept, mean_nll
from qcft.models.generate import Sampling, answer_prompts
from qcft.models.load import load_model
from qcft.recipe import Model

from .helpers.scores import by_hand


@pytest.fixture(scope="module")
def rows(tokenizer):
    turns = [("the cat", "red"), ("a dog runs and eats " * 8, "blue blue bird"), ("one", "two three four " * 9)]
    made = [Row((Message("user", q),), (Message("assistant", a),)) for q, a in turns]
    made.append(Row(made[0].prompt, (*made[0].completion, Message("user", "bird"), Message("assistant", "green"))))
    return Encoder(tokenizer).encode_all(made).encoded


@pytest.mark.parametrize(("kind", "near"), [("fp32", 1e-5), ("none", 1e-2), ("nf4", 1e-2)])
def test_scores_equal_those_computed_by_hand(tiny_model, rows, kind, near):
    """Row by row without padding; in bf16 the kernels differ a little between batch sizes."""
    model = load_model(tiny_model, Model(name="tiny"), "nf4" if kind == "nf4" else "none")
    model = model.float() if kind == "fp32" else model
    scores = score_rows(model, rows, Watch(), "test")
    for row, score in zip(rows, scores, strict=True):
        nll, tokens = by_hand(model, row)
        assert score.tokens == tokens == row.answer_tokens
        assert score.nll == pytest.approx(nll, rel=near)
    total = sum(by_hand(model, row)[0] for row in rows) / sum(row.answer_tokens for row in rows)
    assert mean_nll(scores) == pytest.approx(total, rel=near)


def test_an_nll_that_is_not_finite_is_an_error(tiny_model, rows):
    model = load_model(tiny_model, Model(name="tiny"), "none")
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(QcftError, match="held-out: the NLL is nan"):
        score_rows(model, rows, Watch(), "held-out")


def test_accuracy_counts_the_top_token(tiny_model, rows):
    model = load_model(tiny_model, Model(name="tiny"), "none")
    score = score_rows(model, rows[:1], Watch(), "test")[0]
    with torch.no_grad():
        top = model(torch.tensor([rows[0].input_ids])).logits[0, :-1].argmax(-1).tolist()
    assert score.correct == sum(t == w for t, w in zip(top, rows[0].labels[1:], strict=True) if w != IGNORED)


def test_greedy_answers_equal_transformers_own(tiny_model, tokenizer):
    """In a batch with left padding as alone."""
    model = load_model(tiny_model, Model(name="tiny"), "none").float()
    encoder = Encoder(tokenizer)
    prompts = [encoder.prompt_ids(Row((Message("user", t),), ())) for t in ("the cat", "one two three four " * 5)]
    answers = answer_prompts(model, tokenizer, prompts, encoder.end_ids, Sampling(12), 2, Watch())
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        made = alone[0, len(prompt) :].tolist()
        end = next((i for i, t in enumerate(made) if t in encoder.end_ids), None)
        assert answer.tokens == (len(made) if end is None else end)
        assert answer.finished == (end is not None)
        assert answer.text == tokenizer.decode(made[:end], skip_special_tokens=True).strip()


def scores(*nlls, tokens=10):
    return [RowScore(n * tokens, tokens, 0) for n in nlls]


@settings(deadline=None)  # libraries load in the first example
@given(st.lists(st.tuples(st.floats(0, 9), st.floats(0, 9), st.integers(1, 50)), min_size=2, max_size=30))
def test_a_difference_is_that_of_the_means_and_is_in_its_interval(rows):
    a = [RowScore(x * n, n, 0) for x, _, n in rows]
    b = [RowScore(y * n, n, 0) for _, y, n in rows]
    found = difference(a, b)
    assert found.value == pytest.approx(mean_nll(b) - mean_nll(a), abs=1e-9)
    if found.low is not None:
        assert found.low - 1e-9 <= found.value <= found.high + 1e-9
    assert difference(b, a).value == pytest.approx(-found.value)
    assert found.rows == found.clusters == len(rows)


def test_the_interval_is_a_bootstrap_t_drawn_in_another_way():
    """Rows of different lengths; each resample draws the same rows for both models."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(1, 40, 30)
    before = generator.gamma(2, 1, 30) * tokens
    after = before + generator.gamma(1, 0.5, 30) * tokens
    a, b = ([RowScore(float(nll), int(n), 0) for nll, n in zip(nlls, tokens, strict=True)] for nlls in (before, after))
    found = difference(a, b)

    def studied(places):
        change, n = (after - before)[places], tokens[places]
        mean = change.sum() / n.sum()
        return mean, np.sqrt(len(n) / (len(n) - 1) * ((change - mean * n) ** 2).sum()) / n.sum()

    mean, error = studied(np.arange(30))
    drawn = [studied(generator.integers(0, 30, 30)) for _ in range(4000)]
    low, high = np.quantile([(one - mean) / own for one, own in drawn], [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((mean - high * error, mean - low * error), rel=0.04)
    assert found.high - mean > 1.1 * (mean - found.low)  # the rows are skewed


def test_the_interval_narrows_with_rows_and_is_repeatable():
    few = difference(scores(*[1, 2] * 4), scores(*[1.2, 2.6] * 4))
    many = difference(scores(*[1, 2] * 100), scores(*[1.2, 2.6] * 100))
    assert many.high - many.low < few.high - few.low
    assert many.is_clear
    assert few == difference(scores(*[1, 2] * 4), scores(*[1.2, 2.6] * 4))


@pytest.mark.parametrize(
    ("base", "live", "merged", "share", "worse"),
    [
        (2.0, 1.5, 1.52, 0.96, False),
        (2.0, 1.5, 1.9, 0.2, False),
        (2.0, 1.5, 2.1, -0.2, False),
        (2.0, 1.97, 1.98, None, False),
        (2.0, 1.97, 2.04, None, True),
    ],
)
def test_kept(base, live, merged, share, worse):
    spread = [0.0, 0.1, -0.1, 0.05, -0.05, 0.0]
    values = ((base, 1.1), (live, 1.0), (merged, 1.0))  # rows gain unlike
    found = kept(*(scores(*[value + times * s for s in spread]) for value, times in values))
    assert found.share == (None if share is None else pytest.approx(share))
    assert found.worse is worse


def test_a_gain_whose_interval_holds_zero_is_not_measurable():
    found = kept(scores(3.0, 1.0, 1.0, 1.0), scores(1.0, 1.1, 1.1, 1.1), scores(3.0, 1.0, 1.0, 1.0))
    assert found.gain.value > 0.05
    assert found.share is None


def test_means_are_per_answer_token():
    both = [RowScore(10.0, 5, 1), RowScore(2.0, 15, 10)]
    assert mean_nll(both) == pytest.approx(0.6)
    assert accuracy(both) == pytest.approx(11 / 20)
    assert math.isfinite(mean_nll(both))
