"""The mix is exact: sizes, shares, every row once, replay spread evenly; packs lose nothing."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcft.data.encode import EncodedRow
from qcft.data.mix import in_groups, mixed_order
from qcft.recipe import Replay, Train
from qcft.replay.amount import replay_amount, rounded
from qcft.training.batches import make_batches


@given(st.integers(0, 100_000), st.integers(0, 90))
def test_the_share_is_exact_to_one_row(new, percent):
    replay = rounded(replay_amount(Replay(ratio=percent / 100), new))
    exact = Fraction(percent, 100 - percent) * new
    assert abs(replay - exact) <= Fraction(1, 2)


@pytest.mark.parametrize(
    ("new", "ratio", "replay"), [(300, 0.2, 75), (80, 0.1, 9), (1, 0.2, 0), (100, 0.5, 100), (7, 0, 0)]
)
def test_known_sizes(new, ratio, replay):
    assert rounded(replay_amount(Replay(ratio=ratio), new)) == replay


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 120), st.integers(0, 60), st.integers(0, 3))
def test_every_row_comes_exactly_once(new, replay, seed):
    order = mixed_order(new, replay, seed)
    assert sorted(order) == list(range(new + replay))
    assert order == mixed_order(new, replay, seed)


@pytest.mark.parametrize(("new", "replay"), [(400, 100), (1900, 100), (300, 300)])
def test_replay_is_spread_evenly(new, replay):
    order = mixed_order(new, replay, 0)
    share = replay / (new + replay)
    window = int(20 / share)  # holds 20 replay rows on average
    counts = [sum(i >= new for i in order[s : s + window]) for s in range(len(order) - window + 1)]
    assert max(counts) <= 40
    assert min(counts) >= 10


def test_each_epoch_is_shuffled_in_another_order():
    assert mixed_order(50, 10, "0:0") != mixed_order(50, 10, "0:1")


def rows_of(lengths):
    return [EncodedRow([i] * n, [i] * n) for i, n in enumerate(lengths)]


@given(
    st.lists(st.integers(0, 40), max_size=60),
    st.integers(1, 100) | st.just(math.inf),
    st.integers(1, 7) | st.just(math.inf),
    st.booleans(),
)
def test_groups_keep_every_item_in_order_and_are_as_large_as_their_limits_allow(sizes, most, count, padded):
    items = [*enumerate(sizes)]
    groups = [*in_groups(items, lambda item: item[1], most, count, padded)]

    def fits(group):
        of = [size for _, size in group]
        return len(group) <= count and (len(of) * max(of) if padded else sum(of)) <= most

    assert [item for group in groups for item in group] == items
    assert all(len(group) == 1 or fits(group) for group in groups)
    assert not any(fits([*group, after[0]]) for group, after in pairwise(groups))


@pytest.mark.parametrize("packing", [True, False])
def test_batch_counts_rows_whether_packed_or_not(packing):
    rows = rows_of([20] * 96)
    batches = make_batches(rows, lambda e: list(range(96)), Train(batch=8, packing=packing, max_length=1024))
    assert batches.steps == 12
    assert batches.rows == 96
    assert batches.tokens_until(3) == 3 * 8 * 20
    assert batches.tokens_until(batches.steps) == 96 * 20


@pytest.mark.parametrize("packing", [True, False])
def test_epochs_and_steps(packing):
    rows = rows_of([10] * 20)
    order = lambda e: list(range(20))  # noqa: E731
    assert make_batches(rows, order, Train(batch=4, epochs=2.5, packing=packing)).rows == 50
    assert make_batches(rows, order, Train(batch=4, steps=13, packing=packing)).steps == 13


def test_a_pack_never_exceeds_max_length():
    rows = rows_of([30, 100, 5, 60, 99, 1] * 10)
    batches = make_batches(rows, lambda e: list(range(60)), Train(batch=16, max_length=128))
    assert all(sum(len(r.input_ids) for r in item) <= 128 for item in batches.items)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=80),
    batch=st.integers(1, 20),
    steps=st.integers(1, 40),
    packing=st.booleans(),
    micro=st.integers(1, 8),
)
def test_steps_and_batch_are_kept_for_rows_of_any_length(lengths, batch, steps, packing, micro):
    """One very long row must not swell the steps; asking for steps gives just as many."""
    rows = rows_of(lengths)
    train = Train(batch=batch, micro_batch=micro, steps=steps, packing=packing, max_length=300)
    batches = make_batches(rows, lambda e: list(range(len(rows))), train)
    assert batches.steps == steps
    if packing:
        assert all(len(item) <= batch for item in batches.items)
        # Packs are whole, so a step comes as near to `batch` rows as whole packs allow.
        assert batch / 2 - 1 <= batches.rows / steps <= batch * 1.5 + 1
    else:
        assert batches.rows == steps * batch


def test_a_long_row_among_short_ones_does_not_enlarge_the_steps():
    rows = rows_of([80] * 99 + [1000])
    batches = make_batches(rows, lambda e: list(range(100)), Train(batch=4, max_length=1024))
    assert 3 <= batches.rows / batches.steps <= 4
