"""Backward transfer, forgetting, paired intervals, SQuAD's scores and ROUGE-L against independent computations; which
measurements are in one table."""

import collections
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from qcft.data.rows import Message, Row
from qcft.files import file_digest
from qcft.measure.ability_table import abilities_table, continual_nll
from qcft.measure.catalog import family_of, language_of
from qcft.measure.continual import Items, backward_transfer, forgetting, paired_changes
from qcft.measure.fidelity import judge_answer
from qcft.measure.rouge import rouge_l, words
from qcft.measure.squad import compute_exact, compute_f1
from qcft.models.generate import Answer
from qcft.recipe import recipe_from
from qcft.report.arms import grouped
from qcft.report.task_cells import way_of_asking
from qcft.store.opened import DoneStep

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


def changed(before, after, weights=()):
    """The changes of tasks, each of items of its own, and of their average."""
    items = [
        Items(one, other, [(at, place) for place in range(len(one))])
        for at, (one, other) in enumerate(zip(before, after, strict=True))
    ]
    return paired_changes(items, [weights] if weights else [])


def test_the_interval_of_one_task_is_students_by_scipy():
    generator = np.random.default_rng(1)
    before, after = generator.random(80), generator.random(80) + 0.1
    (found,) = changed([before], [after])
    theirs = stats.ttest_rel(after, before).confidence_interval(0.95)
    assert found.value == pytest.approx((after - before).mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.002)
    assert (found.items, found.clusters, found.compared) == (80, 80, 1)


@settings(deadline=None)  # libraries load in the first example
@given(st.lists(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=20), min_size=1, max_size=4))
def test_an_average_weights_tasks_not_items(tasks):
    before, after = ([[pair[i] for pair in task] for task in tasks] for i in (0, 1))
    *_, found = changed(before, after, [1 / len(tasks)] * len(tasks))
    wanted = np.mean([np.mean(b) - np.mean(a) for a, b in zip(before, after, strict=True)])
    assert found.value == pytest.approx(wanted, abs=1e-9)
    *_, turned = changed(after, before, [1 / len(tasks)] * len(tasks))
    assert turned.value == pytest.approx(-found.value, abs=1e-9)
    if found.low is not None:
        assert found.low - 1e-9 <= found.value <= found.high + 1e-9
        assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), rel=1e-6, abs=1e-9)


def test_no_change_is_not_clear_and_a_sure_one_is():
    assert not changed([[0, 1, 1, 0]], [[0, 1, 1, 0]])[0].is_clear
    assert changed([[0.0] * 30], [[1.0] * 29 + [0.0]])[0].is_clear


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


# Tables, of artefacts as evaluations leave them

SCORES = {"base": [1, 1, 1, 0], "phase2": [1, 0, 0, 0]}  # English, item by item; in Spanish the other way round


@pytest.fixture
def recipe(raw_recipe):
    """One phase in Spanish: the unmodified model is phase 1."""
    phase = {**raw_recipe["phases"][1], "data": [{"path": "es.jsonl", "lang": "es-MX"}], "replay": None}
    return recipe_from({**raw_recipe, "phases": [phase]})


def evaluations(folder, changes=None, tasks=("hellaswag", "xquad_es", "fidelity")):
    """Both stages on all tasks; `changes`: what is other in phase 2's settings and metrics of a task."""
    made = {}
    for stage, items in SCORES.items():
        for task in tasks:
            lang = "es" if task.endswith("_es") else "en"
            values = items if lang == "en" else [1 - value for value in items]
            settings = {"quantize": "nf4", "lm_eval": "1", "limit": 4, "data": "hub", "batch": "auto", "prompts": 3}
            metrics = {"task": task, "lang": lang, "metric": "acc", "score": sum(values) / 4, "scores": {}, "items": 4}
            metrics |= {"paired": True, "higher_is_better": True, "shots": 0, "generates": False, "prompts": "p"}
            if task == "fidelity":
                answers = {"right": 1.0, "told": 3, "rows": 3, "mean_tokens": 9.0, "unfinished": 0.0}
                metrics = {"task": task, "languages": {"es": answers}}
            for where, change in (changes or {}).get(task, {}).items() if stage == "phase2" else ():
                (settings if where in settings and where != "prompts" else metrics)[where] = change
            place = folder / stage / task
            place.mkdir(parents=True)
            (place / "step.json").write_text(json.dumps({"inputs": {"settings": settings}}))
            (place / "items.jsonl").write_text("".join(json.dumps({"scores": {"acc": v}}) + "\n" for v in values))
            record = {"metrics": metrics, "files": {"items.jsonl": file_digest(place / "items.jsonl")}}
            made[f"abilities/{stage}/{task}"] = DoneStep("suite-1", place, record)
    return made


def test_averages_changes_and_transfer_of_a_single_phase(recipe, tmp_path):
    (table,) = abilities_table(recipe, evaluations(tmp_path), {})["tables"]
    assert [(s["EA"], s["MA"], s["overall"]) for s in table["stages"]] == [(0.75, 0.25, 0.5), (0.25, 0.75, 0.5)]
    (change,) = table["changes"]
    assert [change[side]["value"] for side in ("EA", "MA", "overall")] == [-0.5, 0.5, 0]
    assert change["overall"]["items"] == 8
    assert table["continual"] == {"backward_transfer": -0.5, "forgetting": 0.5}  # of English, by the unmodified model
    groups = [{"name": "phase2 es", "phase": "phase2", "english": False}, {"name": "e", "phase": "p", "english": True}]

    def nats(nll):
        return {"nll": nll, "answer_tokens": 9}

    nlls = {"eval/base": (3.0, 1.0), "eval/phase2": (2.0, 1.25)}
    stages = [{"stage": name, "groups": {"phase2 es": nats(es), "e": nats(en)}} for name, (es, en) in nlls.items()]
    assert continual_nll(recipe, {"stages": stages, "groups": groups}) == {
        "backward_transfer": -0.25, "forgetting": 0.25
    }  # fmt: skip


@pytest.mark.parametrize("other", [{"limit": 5}, {"lm_eval": "2"}, {"data": "digest"}, {"prompts": "q"}, {"batch": 2}])
def test_scores_measured_in_another_way_are_in_another_table(recipe, tmp_path, other):
    found = abilities_table(recipe, evaluations(tmp_path, {"hellaswag": other}), {})["tables"]
    assert len(found) == 2
    assert all("hellaswag" not in change["tasks"] for table in found for change in table["changes"])
    held = [{stage["stage"] for stage in table["stages"] if "hellaswag" in stage["scores"]} for table in found]
    assert sorted(map(sorted, held)) == [["base"], ["phase2"]]
    json.dumps(found)


def test_the_language_of_answers_measured_in_another_way_is_in_another_table(recipe, tmp_path):
    same = abilities_table(recipe, evaluations(tmp_path / "a"), {})["fidelity"]
    assert [len(cells) for cells in grouped(same, way_of_asking)] == [2]
    apart = abilities_table(recipe, evaluations(tmp_path / "b", {"fidelity": {"data": "other"}}), {})["fidelity"]
    assert [len(cells) for cells in grouped(apart, way_of_asking)] == [1, 1]


@pytest.mark.parametrize(
    ("task", "text", "lang", "family"),
    [
        ("xquad_es", "The name of a suite's task is trusted.", "es", "xquad"),
        ("xlsum_en", "", "en", "xlsum"),
        ("hellaswag", "Un texto que no es inglés, pero la tarea sí.", "en", "hellaswag"),
        ("commonsense_qa", "Where would you find a revolving door for two directions?", "en", "commonsense"),
        ("agieval_lsat_ar", "A committee of four people is chosen from seven.", "en", "agieval_lsat"),
        ("belebele_spa_Latn", "Los trabajadores construyeron una casa cerca del río.", "es", "belebele"),
        ("kobest_copa", "그는 아침에 일찍 일어나서 학교에 갔다. 왜냐하면 시험이 있었기 때문이다.", "ko", "kobest_copa"),
        ("mmmlu_es_la", "Los trabajadores construyeron una casa cerca del río.", "es", "mmmlu"),
        ("arc_easy", "2 + 2", "en", "arc_easy"),
        ("arc_id", "2 + 2", "id", "arc"),
    ],
)
def test_a_tasks_language_is_what_its_items_are_in(task, text, lang, family):
    assert language_of(task, [text] * 3) == lang
    assert family_of(task) == family


def test_answers_in_a_language_that_cannot_be_identified():
    row = Row((Message("user", "?"),), (Message("assistant", "Un gato."),))
    answer = Answer("El gato rojo corre por la casa y duerme en el jardín.", 14, True)
    assert [judge_answer(row, answer, lang)["right"] for lang in ("es", "es-MX", "en", "xx")] == [
        True,
        True,
        False,
        None,
    ]
    assert judge_answer(row, answer, "es")["reference"] == "Un gato."
