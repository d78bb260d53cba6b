"""Languages of unequal size: how many rows each gives, which, in which order, and what a step's id depends on."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcft import InputError
from qcft.data.balance import NOT_DRAWN, balanced_rows
from qcft.data.mix import mixed_order
from qcft.events import Watch
from qcft.plan import make_plan
from qcft.prepare.prepared import Prepared
from qcft.recipe import Temperature, recipe_from

from .helpers.tiny import write_rows

SIZES = {"es": 9958, "ja": 10191, "pt": 14700}
COUNTS = {"es": 12, "pt": 30, "fr": 60}


def test_how_many_rows_each_language_gives():
    assert balanced_rows(SIZES, "none") == SIZES
    assert balanced_rows(SIZES, "equal") == dict.fromkeys(SIZES, 9958)
    assert balanced_rows(SIZES, Temperature(temperature=1)) == SIZES
    # 100 * (400 / 100) ** (1 / 2) = 200, and so on.
    assert balanced_rows({"a": 100, "b": 400, "c": 900}, Temperature(temperature=2)) == {"a": 100, "b": 200, "c": 300}
    assert balanced_rows({"a": 100, "b": 800}, Temperature(temperature=3)) == {"a": 100, "b": 200}
    assert balanced_rows({"a": 100, "b": 800}, Temperature(temperature=1e9)) == {"a": 100, "b": 100}


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=6), st.floats(1, 1e6))
def test_no_row_is_repeated_and_the_smallest_gives_all(sizes, temperature):
    rows = dict(enumerate(sizes))
    given_ = balanced_rows(rows, Temperature(temperature=temperature))
    assert min(given_.values()) == min(sizes)
    assert all(given_[lang] <= rows[lang] for lang in rows)


@pytest.fixture
def uneven(raw_recipe, tmp_path):
    """A recipe whose only phase has 12, 30 and 60 rows, French in two files."""
    data = []
    for lang, count in COUNTS.items():
        rows = [{"instruction": f"{lang} {i}", "output": "red"} for i in range(count * 2)]
        files = [rows] if lang != "fr" else [rows[::2], rows[1::2]]
        for number, part in enumerate(files):
            path = write_rows(tmp_path / f"{lang}{number}.jsonl", part)
            data.append({"path": str(path), "lang": lang, "take": count // len(files)})
    phase = {**raw_recipe["phases"][1], "name": "phase2", "data": data, "replay": None, "freeze": "none"}
    return {**raw_recipe, "phases": [phase]}


def prepare(raw, **changes):
    return Prepared(recipe_from(raw, changes), Watch())


def given_by(prepared):
    sets = prepared.encoded(prepared.recipe.phases[0])
    counts = {}
    for source, one in zip(prepared.sources["phase2"], sets, strict=True):
        counts[source.lang] = counts.get(source.lang, 0) + len(one.rows)
    return counts, sets


@pytest.mark.parametrize(
    ("balance", "wanted"),
    [("none", COUNTS), ("equal", dict.fromkeys(COUNTS, 12)), ({"temperature": 2}, {"es": 12, "pt": 19, "fr": 27})],
)
def test_rows_are_drawn_without_repeats_and_the_rest_is_counted(uneven, balance, wanted):
    counts, sets = given_by(prepare(uneven, **{"phase2.balance": balance}))
    assert counts == wanted
    rows = [row for one in sets for row in one.rows]
    assert len({row.key for row in rows}) == len(rows)
    assert all(len(one.rows) == len(one.encoded) for one in sets)
    assert sum(one.left_out.get(NOT_DRAWN, 0) for one in sets) == sum(COUNTS.values()) - sum(wanted.values())
    if balance != "none":
        assert all(0 < len(one.rows) < 30 for one in sets[2:])  # French, from both of its files


def test_the_seed_draws_others(uneven):
    drawn = [given_by(prepare(uneven, **{"phase2.balance": "equal", "seed": seed}))[1][1].rows for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_languages_are_interleaved(uneven):
    prepared = prepare(uneven, **{"phase2.balance": {"temperature": 2}})
    phase = prepared.recipe.phases[0]
    order = prepared.order(phase, 0)
    assert sorted(order(0)) == list(range(12 + 19 + 27))
    assert order(0) == order(0) != order(1)
    langs = ["a"] * 1000 + ["b"] * 3000
    for window in range(0, 4000, 400):
        stretch = mixed_order(4000, 0, 0, langs)[window : window + 400]
        assert 70 <= sum(langs[i] == "a" for i in stretch) <= 130  # 100 on average
    with_replay = mixed_order(4000, 1000, 0, langs)
    assert sorted(with_replay) == list(range(5000))
    assert [i for i in with_replay if i < 4000] == mixed_order(4000, 0, 0, langs)


def test_replay_is_sized_beside_the_rows_that_are_drawn(uneven, color_data):
    from qcft.runner.forecast import plan_phase

    replay = {"ratio": 0.5, "kind": "english", "data": str(color_data / "en.jsonl"), "parallel": False}
    prepared = prepare(uneven, **{"phase2.balance": "equal", "phase2.replay": replay})
    _, batches = plan_phase(prepared, prepared.recipe.phases[0], "cpu", 1 << 40)
    assert batches.rows == 72


def test_ids_depend_on_it_only_where_it_is_set(uneven):
    def ids(**changes):
        prepared = prepare(uneven, **changes)
        return {step.stage: step.id for step in make_plan(prepared.recipe, prepared.digests()).steps}

    plain, equal = ids(), ids(**{"phase2.balance": "equal"})
    assert ids(**{"phase2.balance": "none"}) == plain
    assert plain["eval/base"] == equal["eval/base"]
    assert plain["phase2"] != equal["phase2"] != ids(**{"phase2.balance": {"temperature": 2}})["phase2"]
    relabelled = ids(**{"phase2.balance": "equal", "phase2.data.3.lang": "pt"})
    assert relabelled["phase2"] != equal["phase2"]
    prepared = prepare(uneven)
    step = next(s for s in make_plan(prepared.recipe, prepared.digests()).steps if s.stage == "phase2")
    assert "balance" not in step.settings


@pytest.mark.parametrize("value", ["even", 2, None, {"temperature": 0.5}, {"temperature": True}, {"temp": 2}, {}])
def test_bad_values_of_balance(uneven, value):
    with pytest.raises(InputError, match=r"phase2.balance: .* is not none, equal or") as error:
        recipe_from(uneven, {"phase2.balance": value})
    assert error.value.hint == "T is a number of at least 1, as in {temperature: 3}"


def test_its_key_can_be_set_and_is_kept(uneven):
    recipe = recipe_from(uneven, {"phase2.balance.temperature": 3})
    assert recipe.phases[0].balance == Temperature(temperature=3)
    assert recipe_from(recipe.model_dump(mode="json")) == recipe
