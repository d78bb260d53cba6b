"""Replay: how much of which kind, from which rows, which are dropped; exact, seeded, refused where it cannot be."""

import json
import math
from collections import Counter
from fractions import Fraction

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcft.data.encode import EncodedRow, EncodedSet, Encoder
from qcft.data.filters import AnswerFilter, repetition, speaks_another
from qcft.data.formats import to_row
from qcft.data.mix import mixed_order, stratified
from qcft.data.rows import Message, Row
from qcft.errors import InputError, QcftError
from qcft.events import Note, Watch
from qcft.prepare.checks import check_prepared
from qcft.prepare.prepared import Prepared
from qcft.recipe import Filters, Phase, Replay, ReplayPart, Train, load_recipe, recipe_from
from qcft.replay.amount import repeated, split_amount, take_amount
from qcft.replay.pools import Pool
from qcft.replay.rows import check_replay, make_replay, read_replay
from qcft.replay.share import ReplayShare
from qcft.training.batches import make_batches

from .helpers.tiny import write_rows

WORDS = ("red", "blue", "green", "one", "two", "three", "four", "cat", "dog", "bird", "runs", "sleeps", "eats")


def row_of(number: int, words: int, kind: str = "r") -> Row:
    answer = " ".join(WORDS[(number + i) % len(WORDS)] for i in range(words))
    return Row((Message("user", f"what {kind} {number}"),), (Message("assistant", answer),), f"{kind}{number}")


def phase_with(**replay) -> Phase:
    return Phase.model_validate({"name": "phase2", "data": "x", "replay": replay})


def chosen(encoder, pools, new, folder, watch=None, **replay):
    """The metrics of a replay drawn from pools of real rows, and the rows in its file."""
    folder.mkdir(parents=True, exist_ok=True)
    phase = phase_with(**replay)
    none = [None] * len(pools)
    metrics = make_replay(phase.name, phase.replay, pools, [new], encoder, none, folder, watch or Watch())
    return metrics, read_replay(folder / "replay.jsonl")


def pool_of(rows, kind="phase1", weight=1.0):
    part = ReplayPart(kind=kind, weight=weight, path="f" if kind == "file" else None)
    return Pool(part, tuple(rows), "rows of a test", {})


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer, max_length=256)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    new=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    percent=st.integers(0, 90),
    unit=st.sampled_from(["rows", "tokens"]),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=250),
    weights=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    seed=st.integers(0, 3),
)
def test_the_share_is_exact_in_rows_and_in_answer_tokens(encoder, tmp_path, new, percent, unit, lengths, weights, seed):
    """To half a row in rows, to one row's length in tokens; a pool that cannot give it is refused."""
    ratio = percent / 100
    fresh = encoder.encode_all(row_of(i, n, "new") for i, n in enumerate(new))
    rows = [row_of(i, n, "old") for i, n in enumerate(lengths)]
    kinds = ["phase1", "english", "file"][: len(weights)]
    pools = [pool_of(rows[k :: len(kinds)], kind, w) for k, (kind, w) in enumerate(zip(kinds, weights, strict=True))]
    mix = [
        {"kind": k, "weight": w, **({"path": "f"} if k == "file" else {})} for k, w in zip(kinds, weights, strict=True)
    ]
    base = fresh.answer_tokens if unit == "tokens" else len(fresh.rows)
    target = Fraction(percent, 100 - percent) * base
    weigh = (lambda r: encoder.encode(r)[0].answer_tokens) if unit == "tokens" else (lambda r: 1)
    longest = max(weigh(r) for r in rows)
    try:
        metrics, drawn = chosen(encoder, pools, fresh, tmp_path, ratio=ratio, unit=unit, mix=mix)
    except QcftError as error:
        assert "can be made" in error.message  # noqa: PT017
        shares = [target * w / sum(weights) for w in weights]
        held = [sum(map(weigh, pool.rows)) for pool in pools]
        assert any(have < share + longest for have, share in zip(held, shares, strict=True))
        return
    total = sum(weigh(row) for row, _ in drawn)
    assert abs(total - target) <= (Fraction(1, 2) if unit == "rows" else longest)
    ids = Counter(row.id for row, _ in drawn)
    assert not ids or max(ids.values()) == 1
    assert metrics["rows"] == len(drawn)
    _, same = chosen(encoder, pools, fresh, tmp_path / "again", ratio=ratio, unit=unit, mix=mix)
    assert same == drawn
    order = mixed_order(len(new), len(drawn), seed)
    assert sorted(order) == list(range(len(new) + len(drawn)))
    assert order == mixed_order(len(new), len(drawn), seed)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(0, 2000))
def test_no_other_first_part_comes_nearer(weights, amount):
    taken, missing = take_amount(weights, Fraction(amount), lambda w: w)
    sums = [sum(weights[:i]) for i in range(len(weights) + 1)]
    assert taken == weights[: len(taken)]
    assert abs(sum(taken) - amount) == min(abs(s - amount) for s in sums)
    assert missing == 0 or (missing == amount - sum(weights) and len(taken) == len(weights))


def test_halves_are_rounded_up_and_nothing_is_made_needlessly():
    asked = []

    def rows():
        for i in range(100):
            asked.append(i)
            yield i

    assert len(take_amount(rows(), Fraction(15, 2), lambda r: 1)[0]) == 8
    assert len(asked) == 8
    assert take_amount(rows(), Fraction(0), lambda r: 1) == ([], 0)
    assert len(asked) == 8


@given(st.integers(1, 60), st.integers(0, 300))
def test_repeating_uses_every_row_before_any_comes_again(rows, missing):
    again = Counter(repeated(range(rows), Fraction(missing), lambda r: 1))
    assert sum(again.values()) == missing
    assert not again or max(again.values()) - min(again.get(i, 0) for i in range(rows)) <= 1


def test_parts_sum_to_the_whole():
    assert split_amount(Fraction(75), [2, 1]) == [50, 25]
    assert sum(split_amount(Fraction(7), [0.3, 0.3, 0.1])) == 7


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=200), st.integers(0, 5))
def test_any_first_part_of_a_stratified_order_has_the_strata_in_proportion(strata, seed):
    order = stratified(list(enumerate(strata)), lambda item: item[1], str(seed))
    assert sorted(order) == list(enumerate(strata))
    share = {s: n / len(strata) for s, n in Counter(strata).items()}
    for n in range(1, len(order) + 1):
        counts = Counter(s for _, s in order[:n])
        assert all(abs(counts[s] - share[s] * n) <= len(share) for s in share)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("new", "replay"), [(300, 75), (950, 50), (90, 810), (100, 29), (60, 60)])
def test_replay_is_spread_evenly_over_what_is_trained(new, replay, packing):
    """No window that should hold 20 replay rows or more holds more than twice or less than half of them."""
    lengths = [5 + (i * 37) % 90 for i in range(new + replay)]
    rows = [EncodedRow([1] * n, [1] * n, "replay" if i >= new else "new") for i, n in enumerate(lengths)]
    train = Train(batch=8, packing=packing, max_length=128)
    batches = make_batches(rows, lambda epoch: mixed_order(new, replay, f"0:{epoch}"), train)
    trained = [row.source == "replay" for item in batches.items for row in item]
    share = replay / (new + replay)
    upto = [0]
    for one in trained:
        upto.append(upto[-1] + one)
    for window in range(math.ceil(20 / share), len(trained) + 1):
        for start in range(len(trained) - window + 1):
            assert share * window / 2 <= upto[start + window] - upto[start] <= share * window * 2


@pytest.mark.parametrize("shortfall", ["error", "repeat", "shrink"])
def test_a_pool_that_is_too_small(encoder, tmp_path, shortfall):
    new = encoder.encode_all(row_of(i, 5, "new") for i in range(30))
    pools, events = [pool_of([row_of(i, 5, "old") for i in range(4)])], []
    settings = {"ratio": 0.25, "kind": "phase1", "on_shortfall": shortfall}
    if shortfall == "error":
        with pytest.raises(InputError, match="needs 10 replay rows, but only 4 can be made"):
            check_replay(phase_with(**settings), pools, [new], encoder)
        with pytest.raises(QcftError, match="only 4 can be made"):
            chosen(encoder, pools, new, tmp_path, **settings)
        return
    check_replay(phase_with(**settings), pools, [new], encoder)
    metrics, drawn = chosen(encoder, pools, new, tmp_path, Watch(events.append), **settings)
    counts = Counter(row.id for row, _ in drawn)
    assert sorted(counts.values()) == ([2, 2, 3, 3] if shortfall == "repeat" else [1, 1, 1, 1])
    assert metrics["parts"][0]["repeated"] == (6 if shortfall == "repeat" else 0)
    assert metrics["share_of_rows"] == (10 / 40 if shortfall == "repeat" else 4 / 34)
    assert any(isinstance(e, Note) and "6 rows too few" in e.text for e in events)


def test_rows_that_cannot_train_are_refused_before_and_kept_with_the_reason(encoder, tmp_path):
    new = encoder.encode_all(row_of(i, 5, "new") for i in range(30))
    long = [row_of(i, 400, "long") for i in range(5)]
    with pytest.raises(InputError, match=r"none of the 5 rows can be used .* 5 longer than max_length"):
        check_replay(phase_with(ratio=0.1, kind="phase1"), [pool_of(long)], [new], encoder)
    asked = Row((Message("user", "red " * 400),), ())
    with pytest.raises(InputError, match=r"none of the 1 rows can be used .*1 longer than max_length"):
        check_replay(phase_with(ratio=0.1), [pool_of([asked], "generative")], [new], encoder)
    metrics, drawn = chosen(
        encoder, [pool_of(long + [row_of(i, 5) for i in range(9)])], new, tmp_path, ratio=0.1, kind="phase1"
    )
    assert metrics["left_out"] == {"longer than max_length": 5}
    aside = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert [a["id"] for a in aside] == [f"long{i}" for i in range(5)]
    assert {a["reason"] for a in aside} == {"longer than max_length"}
    assert len(drawn) == 3


def test_no_row_is_drawn_as_two_kinds(encoder, tmp_path):
    new = encoder.encode_all(row_of(i, 5, "new") for i in range(20))
    rows = [row_of(i, 5, "old") for i in range(12)]
    mix = ["phase1", "english"]
    _, drawn = chosen(encoder, [pool_of(rows), pool_of(rows, "english")], new, tmp_path, ratio=0.2, mix=mix)
    assert len(drawn) == 5
    assert len({row.id for row, _ in drawn}) == 5
    assert Counter(kind for _, kind in drawn) == {"phase1": 3, "english": 2}


@pytest.mark.parametrize(
    ("text", "finished", "reason"),
    [
        ("", True, "empty answer"),
        ("  \n", False, "empty answer"),
        ("A good answer", False, None),
        ("no no no no no no no no no no no no", False, "loop"),
        ("no no no no no no no no no no no no", True, "loop"),
        ("the cat sat on the mat. " * 6, True, "loop"),
        ("ははははははははははははははははははは", True, "loop"),
        ("El gato está en la casa y no quiere salir porque hace mucho frío afuera.", True, "wrong language"),
        ("Sí", True, None),  # too short to judge
        ("Paris", True, None),
        ("I'm sorry, but I cannot help with that request.", True, "refusal"),
        ("As an AI language model, I have no feelings.", True, "refusal"),
        ("I'm unable to assist with that request.", True, "refusal"),
        ("We are not able to provide it.", True, "refusal"),
        ("I'm able to help.", True, None),
        ("I can't believe I'm so far from home.", True, None),
        ("1. Eat fruit.\n2. Drink water.\n3. Sleep eight hours.\n4. Walk every day.", True, None),
    ],
)
def test_answers_are_dropped_for_a_reason(text, finished, reason):
    assert AnswerFilter(Filters(refusals=True)).reason(text, finished) == reason


def test_filters_can_be_turned_off_and_duplicates_are_found():
    assert AnswerFilter(Filters(unfinished=True)).reason("A good answer", False) == "unfinished answer"
    keep = AnswerFilter(Filters(loops=None, language=None, duplicates=False))
    assert keep.reason("no " * 30, True) is None
    assert keep.reason("El gato está en la casa y no quiere salir hoy.", True) is None
    keep, answer = AnswerFilter(Filters()), "The seven colors are red, orange, yellow, green, blue, indigo, violet."
    assert [keep.reason(text, True) for text in (answer, " " + answer, "Yes", "Yes")] == [None, "duplicate", None, None]
    assert keep.reason("I'm sorry, but I cannot help with that request.", True) is None


def test_repetition_and_language():
    assert repetition("one two three") == 0
    assert repetition("a b c d e " * 3) == pytest.approx(1 - 5 / 11)
    assert speaks_another("Das ist ein schöner Tag, und ich gehe mit dem Hund spazieren.", "en")
    assert not speaks_another("Das ist ein schöner Tag, und ich gehe mit dem Hund spazieren.", "de")


@pytest.mark.parametrize(
    ("replay", "message"),
    [
        (float("nan"), "outside [0, 0.9]"),
        (0.91, "outside [0, 0.9]"),
        ({"ratio": -0.1}, "outside [0, 0.9]"),
        ({"ratio": True}, "should be a number"),
        ({"ratio": 0.2, "unit": "words"}, "unit"),
        ({"ratio": 0.2, "kind": "file"}, "needs path"),
        ({"ratio": 0.2, "path": "x"}, "takes no path"),
        ({"ratio": 0.2, "kind": "phase1", "data": "x"}, "takes no data"),
        ({"ratio": 0.2, "kind": "english", "mix": ["phase1"]}, "both mix and one kind"),
        ({"ratio": 0.2, "mix": [{"kind": "phase1", "weight": 0}]}, "greater than 0"),
        ({"ratio": 0.2, "mix": ["phase3"]}, "kind"),
        ({"ratio": 0.2, "filters": {"loop": 1}}, "unknown key"),
        ({"ratio": 0.2, "parallel": False}, "parallel"),
    ],
)
def test_bad_replay_is_refused(raw_recipe, replay, message):
    raw_recipe["phases"][1]["replay"] = replay
    with pytest.raises(InputError, match=message.replace("[", r"\[")):
        recipe_from(raw_recipe)


def test_shorthands(raw_recipe):
    raw_recipe["phases"][1]["replay"] = 0.2
    assert recipe_from(raw_recipe).phase("phase2").replay == Replay(ratio=0.2)
    recipe = recipe_from(raw_recipe, {"phase2.replay.mix": ["generative", {"kind": "phase1", "weight": 2}]})
    assert [(p.kind, p.weight) for p in recipe.phase("phase2").replay.parts()] == [("generative", 1), ("phase1", 2)]
    assert recipe_from(recipe.model_dump(mode="json")) == recipe


def test_paths_of_replay_are_relative_to_the_recipe(raw_recipe, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [])
    mix = [{"kind": "english", "data": "rows.jsonl"}, {"kind": "file", "path": "rows.jsonl"}]
    raw_recipe["phases"][1]["replay"] = {"ratio": 0.2, "mix": mix}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw_recipe))
    english, file = load_recipe(tmp_path / "recipe.yaml").phase("phase2").replay.parts()
    assert english.data[0].path == file.path == str(tmp_path / "rows.jsonl")


def prepared(raw_recipe, replay, **phase2):
    raw_recipe["phases"][1] |= {"replay": replay, **phase2}
    return Prepared(recipe_from(raw_recipe), Watch())


def test_prompts_are_english_versions_by_id_else_of_phase1_else_those_that_ship(raw_recipe, color_data, tmp_path):
    pool = prepared(raw_recipe, 0.2).pools["phase2"][0]
    assert pool.reason == "English versions of 12 of the 12 rows of phase2, in phase1 by id"
    assert all(row.completion == () and "color" in row.prompt[0].content for row in pool.rows)
    without = [{k: v for k, v in json.loads(line).items() if k != "id"} for line in (color_data / "es.jsonl").open()]
    data = [{"path": str(write_rows(tmp_path / "es.jsonl", without)), "lang": "es"}]
    pool = prepared(raw_recipe, 0.2, data=data).pools["phase2"][0]
    assert pool.reason == "prompts of phase1: phase2 has no English versions"
    columns = [row | {"instruction_en": f"say it {i}", "output_en": "red"} for i, row in enumerate(without)]
    data = [{"path": str(write_rows(tmp_path / "en.jsonl", columns)), "lang": "es"}]
    pool = prepared(raw_recipe, 0.2, data=data).pools["phase2"][0]
    assert "from its *_en columns" in pool.reason
    assert pool.rows[0].prompt[0].content.startswith("say it")
    english = prepared(raw_recipe, {"ratio": 0.2, "kind": "english"}, data=data).pools["phase2"][0]
    assert english.rows[0].completion[0].content == "red"
    raw_recipe["phases"] = raw_recipe["phases"][1:]
    raw_recipe["phases"][0]["data"] = [{"path": str(color_data / "es.jsonl"), "lang": "es"}]
    assert "ship with qcft" in prepared_one(raw_recipe, 0.2).reason


def prepared_one(raw_recipe, replay):
    raw_recipe["phases"][0]["replay"] = replay
    return Prepared(recipe_from(raw_recipe), Watch()).pools["phase2"][0]


def test_english_versions_need_all_that_is_asked():
    record = {"instruction": "di", "input": "esto", "output": "x", "instruction_en": "say"}
    assert to_row(record, "alpaca").english is None
    assert to_row({**record, "input_en": "this"}, "alpaca").english.prompt[0].content == "say\n\nthis"


def test_prompts_of_a_file_need_no_answers(raw_recipe, tmp_path):
    file = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"name a color {i}"} for i in range(30)])
    pool = prepared(raw_recipe, {"ratio": 0.2, "data": str(file)}).pools["phase2"][0]
    assert pool.reason == "prompts of prompts.jsonl"
    assert 20 <= len(pool.rows) <= 30  # less what is held out


@pytest.mark.parametrize(
    ("replay", "message"),
    [
        ({"kind": "english", "data": "other.jsonl"}, "no id is in both"),
        ({"kind": "english", "data": "noid.jsonl"}, "0 of its 9 rows have an id"),
        ({"kind": "file", "path": "texts.jsonl"}, "columns words: no known format"),
        ({"kind": "file", "path": "empty.jsonl"}, "it is empty"),
        ({"data": "texts.jsonl"}, "columns words: no known format"),
        ({"kind": "file", "path": "missing.jsonl"}, "there is no file"),
    ],
)
def test_pools_that_cannot_be_used_are_refused(raw_recipe, tmp_path, replay, message):
    rows = [{"instruction": f"say {i}", "output": "red"} for i in range(9)]
    write_rows(tmp_path / "other.jsonl", [{**row, "id": f"z{i}"} for i, row in enumerate(rows)])
    write_rows(tmp_path / "noid.jsonl", rows)
    write_rows(tmp_path / "texts.jsonl", [{"words": "red"}])
    write_rows(tmp_path / "empty.jsonl", [])
    replay = {k: str(tmp_path / v) if k in {"data", "path"} else v for k, v in replay.items()}
    with pytest.raises(InputError, match=message):
        _ = prepared(raw_recipe, {"ratio": 0.2, **replay}).pools


def test_rows_that_are_not_parallel_can_be_requested(raw_recipe, tmp_path):
    file = write_rows(tmp_path / "any.jsonl", [{"instruction": f"say {i}", "output": "red"} for i in range(40)])
    replay = {"ratio": 0.2, "kind": "english", "data": str(file), "parallel": False}
    assert prepared(raw_recipe, replay).pools["phase2"][0].reason.endswith("not parallel to phase2")


def test_phase1_replay_needs_its_rows(raw_recipe):
    pool = prepared(raw_recipe, {"ratio": 0.2, "kind": "phase1"}).pools["phase2"][0]
    assert (pool.reason, len(pool.rows)) == ("rows of phase1", 24)
    raw_recipe["phases"] = raw_recipe["phases"][1:]
    with pytest.raises(InputError, match="needs rows of a first phase, but phase2 is the first"):
        prepared_one(raw_recipe, {"ratio": 0.2, "kind": "phase1"})


@pytest.mark.parametrize("stratify", [None, "length", "language"])
def test_the_pool_is_drawn_in_a_seeded_order(raw_recipe, stratify):
    replay = {"ratio": 0.2, "kind": "phase1", "stratify": stratify}
    first, again = (prepared(raw_recipe, replay).pools["phase2"][0].rows for _ in range(2))
    assert first == again
    raw_recipe["seed"] = 1
    other = prepared(raw_recipe, replay).pools["phase2"][0].rows
    assert set(other) == set(first)
    assert other != first


def test_an_unknown_language_is_refused(encoder):
    new = EncodedSet((), (), {})
    with pytest.raises(InputError, match="'english' is not a language"):
        check_replay(phase_with(ratio=0.1, filters={"language": "english"}), [], [new], encoder)


# --- shares in both units


def test_the_share_is_known_in_both_units_before_anything_is_made_unless_it_is_generated(encoder):
    new = encoder.encode_all(row_of(i, 2, "new") for i in range(40))
    pool, prompts = pool_of([row_of(i, 30, "old") for i in range(20)]), [row_of(i, 1, "ask") for i in range(60)]
    share = check_replay(phase_with(ratio=0.2, kind="phase1"), [pool], [new], encoder)
    replayed = encoder.encode_all(pool.rows[:10])
    assert (share.rows, share.answer_tokens) == (10, replayed.answer_tokens)
    assert share.of_rows == 0.2
    assert share.of_answer_tokens == replayed.answer_tokens / (replayed.answer_tokens + new.answer_tokens)
    text = f"replay 0.2 of rows: 20.0% of the rows, {share.of_answer_tokens:.1%} of the answer tokens"
    assert share.in_words() == text
    generated = check_replay(phase_with(ratio=0.2), [pool_of(prompts, "generative")], [new], encoder)
    assert (generated.rows, generated.answer_tokens, generated.warning("phase2")) == (10, None, None)
    assert (
        generated.in_words() == "replay 0.2 of rows: 20.0% of the rows, share of answer tokens known after generation"
    )
    tokens = check_replay(phase_with(ratio=0.2, unit="tokens"), [pool_of(prompts, "generative")], [new], encoder)
    assert (tokens.rows, tokens.answer_tokens) == (None, round(new.answer_tokens / 4))


@pytest.mark.parametrize(
    ("unit", "rows", "tokens", "says"),
    [
        ("rows", 25, 25, None),
        ("rows", 25, 66, None),  # 20% and 39.8%
        ("rows", 25, 70, "20.0% of the rows and 41.2% of the answer tokens, which bear the loss, because its answers "
         "are longer; phase2.replay.unit=tokens (by --set, or in an arm) makes 0.2 a share of the answer tokens"),
        ("rows", 25, 5, "its answers are shorter"),
        ("tokens", 3, 25, "phase2.replay.unit=rows (by --set, or in an arm) makes 0.2 a share of the rows"),
        ("rows", 25, 0, None),  # nothing to compare
        ("rows", 25, None, None),
    ],
)  # fmt: skip
def test_shares_that_are_more_than_twice_apart_are_warned_of(unit, rows, tokens, says):
    warning = ReplayShare(0.2, unit, rows, tokens, 100, 100).warning("phase2")
    assert warning is None if says is None else says in warning


def test_a_run_warns_once_before_any_weights_are_loaded(raw_recipe, tmp_path):
    rows = [{"instruction": f"say {i}", "output": "red " * 20} for i in range(20)]
    replay = {
        "ratio": 0.2,
        "kind": "english",
        "data": str(write_rows(tmp_path / "long.jsonl", rows)),
        "parallel": False,
    }
    raw_recipe["phases"][1] |= {"replay": replay}
    events, memo = [], {}
    for _ in range(2):  # two arms
        check_prepared(Prepared(recipe_from(raw_recipe), Watch(events.append), memo), weights=False)
    warnings = [event.text for event in events if isinstance(event, Note) and event.level == "warning"]
    assert [("phase2: replay is 20.0% of the rows and" in text) for text in warnings] == [True]
