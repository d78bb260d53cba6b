"""Freeze specs: what each freezes, and the errors of those that are none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcft import InputError
from qcft.recipe import Phase, frozen_layers, parse_freeze


@pytest.mark.parametrize(
    ("spec", "layers", "frozen"),
    [
        ("none", 4, set()),
        ("first:0", 4, set()),
        ("first:2", 4, {0, 1}),
        ("last:1", 4, {3}),
        ("first:0.5", 5, {0, 1, 2}),  # 2.5 rounds half up
        ("last:0.25", 10, {7, 8, 9}),
        ("layers:0-2,5", 8, {0, 1, 2, 5}),
        ("layers:3", 8, {3}),
        ("middle:2", 6, {2, 3}),
        ("every:2", 5, {0, 2, 4}),
    ],
)
def test_what_is_frozen(spec, layers, frozen):
    assert frozen_layers(parse_freeze(spec), layers) == frozen


@given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 5))
def test_random_freezes_the_rounded_share(layers, share, seed):
    share = round(share, 2)
    count = int(share * layers + 0.5 + 1e-12)
    spec = parse_freeze(f"random:{share:.2f}@{seed}")
    if count == layers:
        with pytest.raises(InputError, match="freezes all"):
            frozen_layers(spec, layers)
    else:
        assert abs(len(frozen_layers(spec, layers)) - share * layers) <= 0.5 + 1e-9


def test_random_depends_on_its_seed_and_falls_back_to_the_arms():
    assert frozen_layers(parse_freeze("random:0.5@1"), 30) == frozen_layers(parse_freeze("random:0.5"), 30, seed=1)
    assert frozen_layers(parse_freeze("random:0.5@1"), 30) != frozen_layers(parse_freeze("random:0.5@2"), 30)
    # The same on every machine and version: pinned.
    assert sorted(frozen_layers(parse_freeze("random:0.5@3"), 10)) == [1, 2, 4, 5, 8]


@pytest.mark.parametrize(
    "spec",
    [
        "firts:2",
        "first:",
        "first:x",
        "first:-1",
        "first:1.5",
        "layers:",
        "layers:5-2",
        "layers:a",
        "every:1",
        "none:3",
        "",
    ],
)
def test_no_spec(spec):
    with pytest.raises(InputError, match="freeze") as error:
        parse_freeze(spec)
    assert error.value.hint


@pytest.mark.parametrize("spec", ["first:5", "layers:4", "layers:0-9", "last:7"])
def test_out_of_range(spec):
    with pytest.raises(InputError, match=r"model has 4|are 0 to 3"):
        frozen_layers(parse_freeze(spec), 4)


@pytest.mark.parametrize("spec", ["first:4", "last:1.0", "layers:0-3", "middle:0"])
def test_freezing_all(spec):
    with pytest.raises(InputError, match="freezes all 4 layers"):
        frozen_layers(parse_freeze(spec), 4)


def test_a_recipe_holds_a_spec_parsed_and_writes_it_as_it_was_given():
    phase = Phase(name="phase1", data=["rows.jsonl"], freeze="random:0.50@3")
    assert phase.freeze == parse_freeze("random:0.50@3")
    for mode in ("json", "python"):
        written = phase.model_dump(mode=mode)
        assert written["freeze"] == "random:0.50@3"
        assert Phase.model_validate(written) == phase
    assert Phase(name="phase1", data=["rows.jsonl"]).model_dump()["freeze"] == "none"
