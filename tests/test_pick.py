"""The pick of a dial's point: chosen on one half of the rows, reported on the other; English at an equal gain."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcft.measure.equal_gain import english_at_gain, place_of, scores_between
from qcft.measure.pick import MINIMUM, NoPick, Pick, halves, observations, pick_point
from qcft.measure.score import RowScore
from qcft.measure.stats import mean_nll


def scored(english, others, seed=0, rows=24):
    """Scores about a mean NLL of English and of two other languages, whose rows are parallel."""
    draw = random.Random(seed)

    def group(name, mean):
        return [RowScore((mean + draw.gauss(0, 0.02)) * (t := 3 + i % 4), t, 0, f"{name[0]}{i}") for i in range(rows)]

    return {"en": group("en", english), "es": group("others", others), "pt": group("others", others)}


BASE, BEFORE = scored(2.2, 6.0), scored(2.0, 6.0, 1)
POINTS = {
    "0": scored(2.0, 6.0, 2),
    "0.5": scored(2.02, 3.4, 3),
    "0.7": scored(2.05, 2.1, 4),
    "1": scored(2.2, 2.0, 5),
}


def picked(points, base=BASE, before=BEFORE, share=0.95):
    return pick_point(points, "1", base, before, {"en"}, share)


def test_the_most_english_with_the_share_of_the_gain_is_picked():
    found = picked(POINTS)
    assert (found.point, found.points, found.enough) == ("0.7", 4, 2)
    assert picked(POINTS, share=0.5).point == "0.5"
    assert picked(POINTS, share=1.0).point == "1"
    half = found.reported
    assert half.english.rows == half.others.rows == 12
    assert half.english.low < 0.05 < half.english.high
    assert half.against_full.value == pytest.approx(-0.15, abs=0.02)
    assert half.kept.value == pytest.approx(3.9 / 4, abs=0.01)


def test_the_kept_share_is_that_of_the_reporting_rows():
    first, second = halves(BASE)
    found = picked(POINTS)
    rows = [observations(groups, ("es", "pt"), second) for groups in (BASE, POINTS["0.7"], POINTS["1"])]
    nll = [*map(mean_nll, rows)]
    assert found.reported.kept.value == pytest.approx((nll[0] - nll[1]) / (nll[0] - nll[2]))
    assert not first & second
    base, point, full = (np.array([row.nll for row in one]) for one in rows)

    def ratio(draws):
        gains, wholes = (base - point)[draws], (base - full)[draws]
        value = gains.sum(axis=-1) / wholes.sum(axis=-1)
        return value, (gains - value[..., None] * wholes).std(axis=-1) / wholes.mean(axis=-1)

    value, error = ratio(np.arange(len(base)))
    drawn, errors = ratio(np.random.default_rng(1).integers(0, len(base), (20000, len(base))))
    low, high = np.percentile((drawn - value) / errors, [2.5, 97.5])  # bootstrap-t
    bounds = value - high * error, value - low * error
    assert (found.reported.kept.low, found.reported.kept.high) == pytest.approx(bounds, abs=3e-4)


@settings(deadline=None, max_examples=15)
@given(st.randoms(use_true_random=False))
def test_the_rows_that_report_do_not_choose(draw):
    _, reporting = halves(BASE)

    def other(groups):
        return {
            name: [replace(row, nll=draw.uniform(0, 50)) if row.key in reporting else row for row in rows]
            for name, rows in groups.items()
        }

    changed = {name: other(groups) for name, groups in POINTS.items()}
    found = picked(changed, other(BASE), other(BEFORE))
    assert found.point == picked(POINTS).point
    assert found.chosen == picked(POINTS).chosen
    assert found.reported != picked(POINTS).reported


@given(st.permutations(range(24)), st.floats(0.1, 9))
def test_halves_depend_on_keys_alone(order, factor):
    shuffled = {
        name: [replace(rows[i], nll=factor * rows[i].nll) for i in order] for name, rows in reversed(BASE.items())
    }
    assert halves(shuffled) == halves(BASE)
    first, second = halves(BASE)
    for name in ("e", "o"):
        assert len([key for key in first if key[0] == name]) == len([key for key in second if key[0] == name]) == 12


def test_halves_are_the_same_on_every_machine():
    """Another digest, or another order, would pick by other rows than before."""
    assert sorted(halves(scored(1, 1, rows=4))[0]) == ["e0", "e2", "o0", "o3"]


def test_translations_of_a_row_are_one_observation():
    (row,) = observations(BASE, ("es", "pt"), {"o3"})
    assert row.tokens == sum(r.tokens for name in ("es", "pt") for r in BASE[name] if r.key == "o3")
    assert row.nll == sum(r.nll for name in ("es", "pt") for r in BASE[name] if r.key == "o3")


def test_nothing_is_picked_of_few_rows_or_no_gain():
    few = 2 * MINIMUM - 1
    points = {name: scored(2, 5, rows=few) for name in POINTS}
    found = picked(points, scored(2, 6, rows=few), scored(2, 6, rows=few))
    assert isinstance(found, NoPick)
    assert "8 and 7 English, 7 and 8 others" in found.why or "8 and 7 English, 8 and 7 others" in found.why
    assert f"at least {MINIMUM}" in found.why
    enough = {name: scored(2, 5, rows=2 * MINIMUM) for name in POINTS}
    base = scored(2, 6, rows=2 * MINIMUM)
    assert isinstance(picked(enough, base, base), Pick)
    for others in (6.0, 6.5):
        found = picked({name: scored(2, others, 7) for name in POINTS})
        assert isinstance(found, NoPick)
        assert "no clear gain" in found.why
    without = {name: {"en": groups["en"]} for name, groups in POINTS.items()}
    assert isinstance(picked(without, {"en": BASE["en"]}, {"en": BASE["en"]}), NoPick)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.floats(-5, 5))
def test_a_place_on_the_dial_has_the_gain_that_is_wanted(gains, wanted):
    place = place_of(gains, wanted)
    inside = min(gains) <= wanted <= max(gains)
    assert (place is not None) == inside
    if place:
        i, way = place
        assert 0 <= way <= 1
        after = gains[i + 1] if way else gains[i]
        assert (1 - way) * gains[i] + way * after == pytest.approx(wanted, abs=1e-9)
        before = gains[: i + 1]
        assert all(gain > wanted for gain in before) or all(gain < wanted for gain in before) or gains[i] == wanted


def test_english_is_read_between_two_points():
    gains, english = [0.0, 2.0, 3.0, 4.0], [0.0, 0.01, 0.05, 0.25]
    assert english_at_gain(gains, english, 3.8) == pytest.approx(0.21)
    assert english_at_gain(gains, english, 4.0) == 0.25
    assert english_at_gain(gains, english, 4.1) is None
    assert english_at_gain([0.0, 5.0, 4.0], [0.0, 0.2, 0.4], 4.5) == pytest.approx(0.18)  # the lower scale of two
    rows = [[RowScore(1.0, 2, 0, "a")], [RowScore(3.0, 2, 1, "a")]]
    assert scores_between(rows, (0, 0.25)) == [RowScore(1.5, 2, 0, "a")]
