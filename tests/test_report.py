"""The report on real tiny runs: one run, arms with seeds, what is in it, and that nothing in it can do harm."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcft import api
from qcft.events import Watch
from qcft.files import file_digest, read_json, read_sealed, write_json, write_sealed
from qcft.measure.score import read_scores
from qcft.measure.stats import changes, mean_nll
from qcft.recipe import parse_assignments, recipe_from
from qcft.report.arms import arms_of, differences, flow
from qcft.report.build import build_report
from qcft.report.layers import by_layer
from qcft.report.repeat import arms_section, commands
from qcft.report.samples import measured_start
from qcft.report.standing import front, standings
from qcft.report.suites import last_averages
from qcft.report.tidy import COLUMNS, tidy_table
from qcft.report.training import running_mean

from .helpers.runs import seal_again

ARMS = {
    "plain": {"phase2.replay": None, "phase2.freeze": "none"},
    "frozen": {"phase2.replay": None, "phase2.freeze": "first:2"},
    "replayed": {"phase2.freeze": "none"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("report") / "runs"


@pytest.fixture
def arms(runs, raw_recipe):
    """Three arms, the first with two seeds; made once, for all tests."""
    names = []
    for arm, sets in ARMS.items():
        for seed in (0, 1) if arm == "plain" else (0,):
            name = f"{arm}-s{seed}" if arm == "plain" else arm
            names.append(name)
            if not (runs / name).exists():
                api.run(recipe_from({**raw_recipe, "name": name, "seed": seed}, sets), runs=runs)
    return names


def pages(folder: Path) -> tuple[str, str]:
    return (folder / "report.html").read_text(), (folder / "report.md").read_text()


class Checked(HTMLParser):
    """A page's elements: that they nest, and what they are."""

    VOID = frozenset(("meta", "link", "br"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(page: str) -> Checked:
    checked = Checked()
    checked.feed(page)
    assert checked.open == []
    return checked


def test_a_run_leaves_a_page_with_all_its_sections(arms, runs):
    folder = runs / "replayed" / "report"
    page, text = pages(folder)
    checked = parsed(page)
    titles = [
        "Before and after phase2", "English against the other languages", "Stages and languages",
        "Greedy answers to held-out English prompts",
        "Training", "Layer by layer", "What was trained on", "Cost", "To repeat it",
    ]  # fmt: skip
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == titles
    assert [title for title in titles if f">{title}</h2>" in page] == titles
    tables = {path.stem for path in (folder / "tables").iterdir()}
    assert tables == {"stages", "training", "layers", "mix", "replay", "cost", "versions", "digests"}
    plots = {path.name for path in (folder / "plots").iterdir()}
    names = ("stages", "training-phase1", "training-phase2", "layers", "mix")
    assert plots == {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    for name in names:
        ET.parse(folder / "plots" / f"{name}.svg")
        assert f"](plots/{name}.svg)" in text
    # Nothing comes from elsewhere, and nothing runs.
    assert not [tag for tag, _ in checked.seen if tag in {"script", "iframe", "object", "img", "base", "form"}]
    links = [a[key] for _, a in checked.seen for key in ("href", "src", "xlink:href") if key in a]
    files = {link for link in links if not link.startswith(("#", "data:"))}
    assert files == {f"tables/{name}.csv" for name in tables} | {f"plots/{name}" for name in plots}
    assert not re.findall(r"url\((?!#)", page)
    assert any("default-src 'none'" in a.get("content", "") for _, a in checked.seen)
    ids = [a["id"] for _, a in checked.seen if "id" in a]
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in links if link[0] == "#"} <= set(ids)


def test_the_report_begins_with_answers_before_and_after(arms, runs, raw_recipe, tmp_path):
    """In English and in each language that was taught, with the rows' own answers; those that are stored."""
    _, text = pages(runs / "replayed" / "report")
    plain = api.evidence("replayed", runs)
    _, spanish, portuguese = build_report(arms_of([plain])).sections[0].blocks
    measured = [plain.run.stages[f"eval/{stage}"].opened for stage in ("merged", "phase2")]
    for fold, lang in ((spanish, "es"), (portuguese, "pt")):
        kept = [step.json("samples.json")[lang] for step in measured]
        assert [[answer.text for answer in sample.answers] for sample in fold.samples] == [
            [one["text"] or "(no text)" for one in both] + [both[0]["reference"]] for both in zip(*kept, strict=True)
        ]
    for step in measured:  # as an earlier version left them
        del step.record["files"]["samples.json"]
    (*_, note) = build_report(arms_of([plain])).sections[0].blocks
    assert "No answers in Spanish and Portuguese are stored. `qcft eval replayed --task fidelity`" in note.sentences[0]
    assert text.index("after: phase2") < text.index("## English against the other languages")
    asked = {"tasks": ["fidelity"], "fidelity": {"prompts": 2, "max_new_tokens": 8}}
    if not (runs / "answered").exists():
        api.run(recipe_from({**raw_recipe, "name": "answered", "evaluate": asked}, ARMS["replayed"]), runs=runs)
    run = api.evidence("answered", runs)
    section = build_report(arms_of([run])).sections[0]
    assert (section.title, [fold.title for fold in section.blocks]) == (
        "Before and after phase2", ["English", "Spanish", "Portuguese"]
    )  # fmt: skip
    assert [len(fold.samples) for fold in section.blocks] == [2, 2, 2]
    stored = {
        lang: [run.run.stages[f"abilities/{stage}/fidelity"].opened.json("answers.json")[lang][1]["text"]
               for stage in ("merged", "phase2")]
        for lang in ("es", "pt")
    }  # fmt: skip
    for fold, color in zip(section.blocks, ("green|red|blue", "verde|rojo|azul", "verde|vermelho|azul"), strict=True):
        sample = fold.samples[1]
        assert [answer.stage for answer in sample.answers] == ["before: phase1 merged", "after: phase2", "reference"]
        assert re.fullmatch(f"({color}) ({color})", sample.answers[2].text)
        if sample.lang in stored:
            shown = [answer.text for answer in sample.answers[:2]]
            assert shown == [answer or "(no text)" for answer in stored[sample.lang]]
    # Of several arms what each ends with, beside the first one's start; each prompt once.
    document = build_report(arms_of([api.evidence(name, runs) for name in ("answered", "frozen")]))
    (english, *_), sections = document.sections[0].blocks, {one.anchor: one for one in document.sections}
    titles = ["before: phase1 merged", "after: answered", "after: frozen", "reference"]
    assert [answer.stage for answer in english.samples[0].answers] == titles
    assert len(sections["answers"].blocks) == 1  # of three prompts


def test_what_the_last_phase_starts_from(arms, runs):
    run = api.evidence("replayed", runs)
    assert measured_start(run) == "merged"
    recipe = run.recipe.model_dump(mode="json")
    for start, stage in (("stacked", "phase1"), ("base", "base")):
        assert measured_start(replace(run, recipe=recipe_from(recipe, {"phase2.start": start}))) == stage
    assert measured_start(replace(run, recipe=recipe_from(recipe, {"phase1": None}))) == "base"


def test_old_answers_have_no_reference(arms, runs, tmp_path):
    """Steps of earlier versions do not hold the rows' own answers."""
    copy = shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    for step in copy.glob(".steps/probe-*"):
        write_json(step / "answers.json", [
            {key: value for key, value in answer.items() if key != "reference"}
            for answer in read_json(step / "answers.json")
        ])  # fmt: skip
        seal_again(step)
    english = build_report(arms_of([api.evidence("frozen", copy)])).sections[0].blocks[0]
    titles = ["before: phase1 merged", "after: phase2"]
    assert [[answer.stage for answer in sample.answers] for sample in english.samples] == [titles] * 2


def test_numbers_are_unrounded_in_the_tables(arms, runs):
    done = api.read("replayed", runs)
    folder = runs / "replayed" / "report" / "tables"
    rows = list(csv.DictReader((folder / "stages.csv").open()))
    assert [*rows[0]][:9] == [*COLUMNS]
    levels = {(r["stage"], r["precision"], r["rows_of"]): float(r["value"]) for r in rows if r["measure"] == "nll"}
    for stage in done.table["stages"]:
        for name, score in stage["groups"].items():
            assert levels[stage["name"], stage["precision"], name] == score["nll"]
    (change,) = [r for r in rows if r["measure"] == "nll change" and r["since"] == "phase1" and r["language"] == "en"]
    known = done.table["changes"][0]["groups"]["phase1 en"]
    assert [float(change[key]) for key in ("value", "low", "high", "rows")] == [
        known[key] for key in ("value", "low", "high", "rows")
    ]
    assert (change["arm"], change["seed"], change["stage"]) == ("replayed", "0", "phase2")
    cost = list(csv.DictReader((folder / "cost.csv").open()))
    assert {r["step"] for r in cost} == {stage.step for stage in done.stages.values()}
    seconds = [float(r["value"]) for r in cost if r["measure"] == "seconds"]
    assert sum(seconds) == pytest.approx(api.cost(done)["seconds"])
    assert [r["frozen"] for r in changes_of_layers(runs / "plain-s0")] == ["False"] * 3
    layers = changes_of_layers(runs / "frozen")
    assert [r["frozen"] for r in layers] == ["True", "True", "False"]
    assert [float(r["value"]) > 0 for r in layers] == [False, False, True]


def changes_of_layers(run: Path) -> list[dict]:
    rows = csv.DictReader((run / "report" / "tables" / "layers.csv").open())
    return [row for row in rows if row["stage"] == "phase2"]


def test_the_change_of_a_layer_is_the_norm_of_its_delta(arms, runs):
    """Against the deltas themselves, multiplied out."""
    import torch
    from safetensors.torch import load_file

    folder = runs / "frozen" / "phase2" / "adapter"
    weights, config = load_file(folder / "adapter_model.safetensors"), read_json(folder / "adapter_config.json")
    total = 0.0
    for name, a in weights.items():
        if ".layers.2." in name and "lora_A" in name:
            delta = config["lora_alpha"] / config["r"] * weights[name.replace("lora_A", "lora_B")].double() @ a.double()
            total += float(torch.linalg.norm(delta)) ** 2
    assert float(changes_of_layers(runs / "frozen")[2]["value"]) == pytest.approx(total**0.5, rel=1e-6)


def test_the_same_run_gives_the_same_bytes(arms, runs, tmp_path):
    for place in ("a", "b"):
        api.report(["replayed"], runs, Watch(), tmp_path / place)
    first, second = (
        {path.relative_to(tmp_path / place): path.read_bytes() for path in (tmp_path / place).rglob("*.*")}
        for place in ("a", "b")
    )
    assert len(first) == 20
    assert first == second


def test_runs_are_compared_as_arms_with_their_seeds(arms, runs, qcft, tmp_path):
    code, out, error = qcft("report", *arms, "--runs", runs, "--json")
    assert code == 0, error
    summary = json.loads(out)
    assert summary["page"] == "report/report.html"
    assert summary["question"] == "Which of 3 arms kept the most English for the most gain in es and pt?"
    found = {(row["arm"], row["seed"]): row for row in summary["tables"]["abilities"]}
    assert list(found) == [("plain", 0), ("plain", 1), ("frozen", 0), ("replayed", 0)]
    last = api.read("frozen", runs).table["stages"][-1]["groups"]
    others = [last["phase2 es"], last["phase2 pt"]]
    tokens = sum(g["answer_tokens"] for g in others)
    assert found["frozen", 0]["ea_nll"] == pytest.approx(last["phase1 en"]["nll"])
    assert found["frozen", 0]["ma_nll"] == pytest.approx(sum(g["nll"] * g["answer_tokens"] for g in others) / tokens)
    page, text = pages(tmp_path / "report")
    parsed(page)
    assert text.startswith("# 3 arms: plain, frozen, replayed\n")
    # Steps that runs share are listed once, and counted once.
    cost = summary["tables"]["cost"]
    assert len({row["step"] for row in cost}) == len(cost)
    shared = next(row for row in cost if row["stage"] == "eval/base")
    assert shared["runs"] == "plain-s0; plain-s1; frozen; replayed"
    assert "| base, NF4 | all |" in text
    assert "| phase1, NF4 | all, seed 0 |" in text
    assert (tmp_path / "report" / "plots" / "pareto.svg").is_file()


def test_the_answer_is_about_the_arm_with_the_most_english_among_those_near_the_largest_gain(arms, runs, tmp_path):
    """Computed here in another way, from the scores of the rows."""
    scores = {
        name: {stage: read_json(runs / name / "eval" / stage / "scores.json") for stage in ("base", "phase1", "phase2")}
        for name in arms
    }

    def level(names, stage, groups):
        rows = [[e for g in groups for e in scores[name][stage][g]] for name in names]
        return sum(e["nll"] for row in rows for e in row) / sum(e["tokens"] for row in rows for e in row)

    members = {"plain": ["plain-s0", "plain-s1"], "frozen": ["frozen"], "replayed": ["replayed"]}
    gains = {
        arm: level(names, "base", ["phase2 es", "phase2 pt"]) - level(names, "phase2", ["phase2 es", "phase2 pt"])
        for arm, names in members.items()
    }
    near = [arm for arm in gains if gains[arm] >= 0.9 * max(gains.values())]
    english = {arm: level(members[arm], "phase2", ["phase1 en"]) for arm in gains}
    best = min(near, key=english.get)
    summary = api.report(arms, runs, Watch(), tmp_path / "out")
    if len(near) > 1:  # with one degree of freedom for the seeds nothing differs clearly here
        assert summary["answer"].startswith(f"No winner: of the {len(near)} of 3 arms with at least 90%")
        assert f"{best} has the least English loss" in summary["answer"]
    else:
        assert summary["answer"].startswith(f"Only {best}, of 3 arms, has at least 90% of the largest gain")
    pairs = {(row["against"], row["arm"]): row for row in summary["tables"]["comparisons"]}
    assert [*pairs] == [("plain", "frozen"), ("plain", "replayed"), ("frozen", "replayed")]
    for (one, other), row in pairs.items():
        assert row["value"] == pytest.approx(english[other] - english[one])
        assert row["low"] < row["value"] < row["high"]
        assert (row["level"], row["compared"], row["clusters"]) == (0.95, 3, row["rows"])
        assert row["method"].endswith("over seeds (1 df)")
    lost = {row["arm"]: row for row in summary["tables"]["abilities"]}
    for arm, row in lost.items():
        change = english[arm] - level(members[arm], "phase1", ["phase1 en"])
        assert row["english_value"] == pytest.approx(change)
        assert row["others_value"] == pytest.approx(-gains[arm])
    assert [lost[arm]["english_seeds"] for arm in members] == [2, 1, 1]


def test_one_run_each_names_no_winner_and_gives_the_command(arms, runs, tmp_path):
    summary = api.report(["plain-s0", "frozen", "replayed"], runs, Watch(), tmp_path / "out")
    assert summary["answer"].startswith("No winner is named. One run each")
    assert "qcft ablate RECIPE --seeds 0,1,2" in summary["answer"]
    assert {row["seeds"] for row in summary["tables"]["comparisons"]} == {1}
    page, _ = pages(tmp_path / "out")
    assert "not tested" in page
    assert "differences between runs of one arm were not measured" in page


def test_seeds_of_one_arm_are_reported_by_their_mean(arms, runs, tmp_path):
    summary = api.report(["plain-s0", "plain-s1"], runs, Watch(), tmp_path / "out")
    assert summary["question"].startswith("What did plain gain in es and pt")
    rows = summary["tables"]["abilities"]
    mean = sum(row["ea_nll"] for row in rows) / 2
    before = [
        api.read(name, runs).table["stages"][2]["groups"]["phase1 en"]["nll"] for name in ("plain-s0", "plain-s1")
    ]
    change = mean - sum(before) / 2
    word = "rose" if change > 0 else "fell"
    assert summary["answer"].startswith(f"English loss {word} by {abs(change):.3f} nats per token (95% interval")
    assert summary["answer"].endswith("means over 2 seeds.")


def test_an_arm_that_is_not_done_is_not_compared(arms, runs, tmp_path):
    half = shutil.copytree(runs, tmp_path / "half", symlinks=True)
    step = read_json(half / "replayed" / "run.json")["stages"]["eval/phase2"]
    shutil.rmtree(half / ".steps" / step)
    summary = api.report(["plain-s0", "frozen", "replayed"], half, Watch(), tmp_path / "out")
    assert {row["arm"] for row in summary["tables"]["abilities"]} == {"plain-s0", "frozen"}
    alone = api.report(["replayed"], half, Watch(), tmp_path / "alone")
    assert "not measured" in alone["answer"]
    shutil.rmtree(half / ".steps")
    nothing = api.report(["frozen"], half, Watch(), tmp_path / "nothing")
    assert list(nothing["tables"]) == []


def test_runs_on_other_rows_are_in_separate_tables(arms, runs, raw_recipe, tmp_path):
    if not (runs / "apart").exists():
        api.run(recipe_from({**raw_recipe, "name": "apart", "heldout": {"share": 0.2, "rows": 5}}), runs=runs)
    summary = api.report(["frozen", "apart"], runs, Watch(), tmp_path / "out")
    assert {"stages", "stages-2"} <= summary["tables"].keys()
    assert "abilities" not in summary["tables"]
    assert summary["answer"].startswith("None can be named")
    # Nor what is counted in other tokens, or attended to in another way.
    plain, other = (api.evidence(name, runs) for name in ("plain-s0", "frozen"))
    assert "stages-2" not in {table.name for table in build_report(arms_of([plain, other])).tables()}
    table = json.loads(json.dumps(other.run.table))
    table["stages"][0]["groups"]["phase1 en"]["answer_tokens"] += 1
    counted = replace(other, run=replace(other.run, table=table))
    assert "stages-2" in {table.name for table in build_report(arms_of([plain, counted])).tables()}


def test_arms_are_compared_on_english_that_none_trains_on(arms, runs):
    """Spanish is used as English of another kind: what is compared are the scores of its rows."""
    found = []
    for name in ("plain-s0", "frozen"):
        whole = api.evidence(name, runs)
        table = json.loads(json.dumps(whole.run.table))
        (spanish,) = (g for g in table["groups"] if g["name"] == "phase2 es")
        spanish.update(lang="en", english=True, trained=False)
        found.append(replace(whole, run=replace(whole.run, table=table)))
    scores = [read_scores(one.run.stages["eval/phase2"].opened) for one in found]
    compared = standings(arms_of(found))
    assert [one.place[0] for one in compared] == pytest.approx([mean_nll(one["phase2 es"]) for one in scores])
    before = read_scores(found[0].run.stages["eval/phase1"].opened)
    for one, after in zip(compared, scores, strict=True):
        assert one.lost_trained == changes([({0: before["phase1 en"]}, {0: after["phase1 en"]})])[0]
    tables = {table.name: table for table in build_report(arms_of(found)).tables()}
    assert any("English like that trained on" in column for column in tables["abilities"].head)
    plain = standings(arms_of([api.evidence(name, runs) for name in ("plain-s0", "frozen")]))
    assert [one.lost_trained for one in plain] == [None, None]


def test_the_commands_make_the_first_recipe_into_every_arms(arms, runs):
    recipes = {name: api.read(name, runs) and read_recipe(runs, name) for name in arms}
    first = recipes["plain-s0"]
    for name, recipe in recipes.items():
        sets = parse_assignments([f"{key}={flow(value)}" for key, value in differences(first, recipe).items()])
        made = recipe_from(first.model_dump(mode="json"), {**sets, "name": name, "seed": recipe.seed})
        assert made == recipe


def test_a_removed_or_new_phase_is_printed_as_set_accepts_it(raw_recipe):
    first = recipe_from(raw_recipe)
    single = recipe_from(raw_recipe, {"phase1": None})
    assert differences(first, single) == {"phase1": None}
    for a, b in ((first, single), (single, first)):
        sets = parse_assignments([f"{key}={flow(value)}" for key, value in differences(a, b).items()])
        assert recipe_from(a.model_dump(mode="json"), sets) == b


def test_a_remedy_with_its_defaults_is_printed_by_its_kind(raw_recipe):
    first = recipe_from(raw_recipe)
    found = differences(first, recipe_from(raw_recipe, {"phase2.anchor": "target-masked"}))
    assert found == {"phase2.anchor": {"kind": "target-masked"}}


def read_recipe(runs, name):
    from qcft.store import read_run

    return read_run(runs, name).recipe()


def test_what_a_model_says_stays_text(arms, runs, tmp_path):
    """In the page, in its plots, in Markdown; and its direction is its own."""
    copy = shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    evil = '<script>document.title = "owned"</script><img src=x onerror=alert(1)> | `x` {{ 7*7 }} ]]>'
    stages = read_json(copy / "frozen" / "run.json")["stages"]
    file = copy / ".steps" / stages["eval/phase2"] / "answers.json"
    answers = read_json(file)
    answers[0]["text"] = evil
    answers[1]["text"] = "مرحبا بالعالم"
    write_json(file, answers)
    seal_again(file.parent)
    done = copy / ".steps" / stages["phase2"] / "done.json"
    record = read_sealed(done)
    for share in record["metrics"]["mix"]:
        share["source"] += evil
    for entry in record["metrics"]["exposure"]:
        entry["source"] += evil
    write_sealed(done, record)
    api.report(["frozen"], copy, Watch(), tmp_path / "out")
    page, text = pages(tmp_path / "out")
    checked = parsed(page)
    assert "<script" not in page
    assert "onerror" not in {key for _, attributes in checked.seen for key in attributes}
    assert not [tag for tag, _ in checked.seen if tag in {"script", "img"}]
    assert evil in "".join(checked.text)
    assert "مرحبا بالعالم" in page
    assert '<p class="text" dir="auto"' in page
    assert "<script" not in text.replace("\\<script", "")
    ET.parse(tmp_path / "out" / "plots" / "mix.svg")


def test_the_name_of_an_ablation_means_its_runs(arms, runs, qcft):
    entries = [
        {"arm": "one", "seed": s, "run": f"plain-s{s}", "set": {}, "mixed": False, "error": None} for s in (0, 1)
    ]
    entries.append({"arm": "two", "seed": 0, "run": "frozen", "set": {}, "mixed": False, "error": None})
    wrong = {"message": "out of memory", "hint": "free some"}
    entries.append({"arm": "two", "seed": 1, "run": "never-begun", "set": {}, "mixed": False, "error": wrong})
    (runs / "study").mkdir(exist_ok=True)
    write_json(runs / "study" / "ablation.json", {"version": 1, "name": "study", "runs": entries})
    code, out, error = qcft("report", "study", "--runs", runs, "--json")
    assert code == 0, error
    summary = json.loads(out)
    assert summary["page"] == str(runs / "study" / "report" / "report.html")
    assert {row["arm"] for row in summary["tables"]["abilities"]} == {"one", "two"}


def test_drift_and_similarity_have_their_own_sections(arms, runs, tmp_path):
    """In the form that `qcft drift` and `qcft similarity` leave."""
    copy = shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    layer = {"mean_shift": 0.1, "covariance_shift": 0.2, "cka": 0.99}
    found = {
        "from": "phase1 merged",
        "to": "phase2",
        "text": {"en": {"rows": 4, "tokens": 40}, "es": {"rows": 4, "tokens": 44}},
        "parameters": {
            "mpd": 0.5,
            "norm": 2.0,
            "matrices": 21,
            "pairs": {"from-to": 0.5},
            "scaled": {"from-to": 1.0},
        },
        "layers": [
            {"layer": i, "frozen": i == 0, "mpd": 0.1 * i, "languages": {"en": layer, "es": layer}} for i in range(3)
        ],
    }
    step = copy / ".steps" / "drift-0123456789"
    step.mkdir()
    write_json(step / "drift.json", found)
    write_json(step / "step.json", {"inputs": {"settings": {}}, "versions": {}, "hardware": {}})
    write_json(
        step / "done.json", {"step": step.name, "metrics": {"mpd": 0.5}, "seconds": 1.0, "files": {"drift.json": ""}}
    )
    seal_again(step)
    run = read_json(copy / "frozen" / "run.json")
    run["stages"]["drift/merged-phase2"] = step.name
    write_json(copy / "frozen" / "run.json", run)
    des = {"value": 0.9, "low": 0.8, "high": 0.95, "rows": [24, 24]}
    sides = {"a": {"name": "phase1"}, "b": {"name": "phase2"}, "encoder": {"name": "LaBSE"}}
    more = {"languages": [], "scale": {"paper": None, "qcft": {}}, "says": ["Very similar."]}
    write_json(copy / "frozen" / "report" / "similarity.json", {**sides, "des": des, **more})
    summary = api.report(["frozen"], copy, Watch(), tmp_path / "out")
    assert [(r["layer"], r["lang"]) for r in summary["tables"]["drift-merged-phase2"]] == [
        (i, g) for i in range(3) for g in ("en", "es")
    ]
    page, text = pages(tmp_path / "out")
    assert "<td>[0.800, 0.950]</td>" in page
    assert "- Very similar." in text
    assert (tmp_path / "out" / "plots" / "drift-merged-phase2.png").is_file()


def evaluated(evidence, ea, ma, limit=10):
    """A run as it is once its last phase and its base are evaluated on two tasks."""
    names = {"hellaswag": "en", "xquad_es": "es"}
    tasks = [
        {
            "task": task,
            "lang": lang,
            "metric": "acc",
            "items": 10,
            "shots": 0,
            "limit": limit,
            "max_new_tokens": None,
            "higher_is_better": True,
        }
        for task, lang in names.items()
    ]

    def stage(name, en, es):
        scores = {"hellaswag": en, "xquad_es": es}
        return {"stage": name, "name": name, "precision": "NF4", "scores": scores, "EA": en, "MA": es,
                "overall": (en + es) / 2}  # fmt: skip

    change = {"value": ea - 0.5, "low": -0.2, "high": 0.1, "items": 10, "clear": False, "compared": 2}
    changes = [{"from": "base", "from_name": "base", "to": "phase2", "to_name": "phase2",
                "tasks": {"hellaswag": change}, "EA": change}]  # fmt: skip
    continual = {"backward_transfer": -0.02, "forgetting": 0.02}
    table = {"settings": {"lm_eval": "0.4.13"}, "tasks": tasks, "changes": changes, "continual": continual,
             "stages": [stage("base", 0.5, 0.1), stage("phase2", ea, ma)]}  # fmt: skip
    language = {"right": 0.75, "told": 4, "rows": 4, "mean_tokens": 5.0, "unfinished": 0.0}
    asked = {"data": "d", "prompts": limit, "max_new_tokens": 64}
    cells = [
        {"stage": name, "name": name, "precision": "NF4", "task": "fidelity", "languages": {"es": language},
         "asked": asked}
        for name in ("base", "phase2")
    ]  # fmt: skip
    stages = dict(evidence.run.stages)
    folder = evidence.run.folder.parent.parent / "answered"
    folder.mkdir(exist_ok=True)
    write_json(folder / "answers.json", {"es": []})
    shutil.copy(stages["eval/base"].folder / "step.json", folder)
    record = {"files": {"answers.json": file_digest(folder / "answers.json")}}
    for name, made in (("base", stages["eval/base"]), ("phase2", stages["eval/phase2"])):
        stages |= {f"abilities/{name}/{task}": replace(made, step=f"suite-{made.step}-{task}") for task in names}
        stages[f"abilities/{name}/fidelity"] = replace(made, step=f"suite-{made.step}", folder=folder, record=record)
    abilities = {"tables": [table], "fidelity": cells, "alpaca_eval": []}
    return replace(
        evidence, run=replace(evidence.run, stages=stages, table={**evidence.run.table, "abilities": abilities})
    )


def test_tasks_that_stages_were_evaluated_on_are_in_a_matrix_and_a_plot(arms, runs):
    averages = {"plain-s0": (0.3, 0.4), "plain-s1": (0.5, 0.2), "frozen": (0.45, 0.25), "replayed": (0.2, 0.1)}
    found = [evaluated(api.evidence(name, runs), *averages[name]) for name in arms]
    assert last_averages(arms_of(found)) == {
        "plain": [(0.3, 0.4), (0.5, 0.2)], "frozen": [(0.45, 0.25)], "replayed": [(0.2, 0.1)]
    }  # fmt: skip
    document = build_report(arms_of(found))
    tables = {table.name: table for table in document.tables()}
    assert [row[:2] for row in tables["tasks"].rows] == [
        ("base, NF4", "all"), ("phase2, NF4", "plain, seed 0"), ("phase2, NF4", "plain, seed 1"),
        ("phase2, NF4", "frozen"), ("phase2, NF4", "replayed"),
    ]  # fmt: skip
    assert tables["tasks"].rows[0][2:] == ("50.0", "10.0", "50.0", "10.0", "30.0")
    assert tables["task-changes"].rows[0][1:3] == (
        "phase2 since base\n[95% intervals, 2 simultaneous]", "-20.0\n[-20.0, +10.0]",
    )  # fmt: skip
    assert tables["fidelity"].rows[0][1:] == ("all", "75% of 4 in it\n5 tokens, 0% unfinished")
    assert len(tables["fidelity"].rows) == 5  # the base once, and what the last phase of each run left
    assert "pareto-tasks" in {figure.name for figure in document.figures()}
    assert tables["tasks"].head[2] == "hellaswag \u2191\nacc, 10 items"
    in_spanish = [row for row in tidy_table(tables["tasks"]) if row["rows_of"] == "xquad_es"]
    assert {(row["arm"], row["language"], row["measure"]) for row in in_spanish} == {
        (arm, "es", "acc") for arm in ("plain", "frozen", "replayed")
    }
    assert in_spanish[0]["value"] == 0.1
    # Other settings have a table of their own, and no plot is made of both.
    found[-1] = evaluated(api.evidence("replayed", runs), 0.2, 0.1, limit=20)
    document = build_report(arms_of(found))
    assert {"tasks", "tasks-2", "fidelity", "fidelity-2"} <= {table.name for table in document.tables()}
    assert last_averages(arms_of(found)) is None


@given(st.dictionaries(st.text("abc", min_size=1), st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_the_front_is_what_no_other_beats(places):
    best = front(places)
    assert best
    for name, (a, b) in places.items():
        beaten = any((c <= a and d < b) or (c < a and d <= b) for c, d in places.values())
        assert (name in best) is not beaten


def test_the_live_probe_is_drawn(arms, runs, tmp_path):
    copy = shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    log = copy / ".steps" / read_json(copy / "frozen" / "run.json")["stages"]["phase2"] / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for entry in lines[::2]:
        entry |= {"english_nll": 2.0, "english_change": 0.01}
    log.write_text("".join(json.dumps(entry) + "\n" for entry in lines) + '{"cut')
    seal_again(log.parent)
    api.report(["frozen"], copy, Watch(), tmp_path / "out")
    assert (tmp_path / "out" / "plots" / "english-phase2.svg").is_file()


def test_show_prints_the_cost(arms, runs, qcft):
    code, out, _ = qcft("show", "frozen", "--runs", runs)
    assert code == 0
    assert re.search(r"^9 steps done in .*peak memory .* GiB; .* MB on disk\.$", out, re.MULTILINE)
    assert json.loads(qcft("show", "frozen", "--runs", runs, "--json")[1])["cost"]["steps"] == 9


BROWSER = """#!/bin/sh
printf '%s' "$1" > "$(dirname "$0")/opened"
echo noise
"""


def test_report_opens_the_page_in_the_browser(arms, runs, tmp_path):
    """What the browser prints is not part of the output."""
    browser = tmp_path / "browser"
    browser.write_text(BROWSER)
    browser.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-m", "qcft", "report", "frozen", "--runs", runs, "--to", "a folder", "--open", "--json"],
        cwd=tmp_path, env={**os.environ, "BROWSER": str(browser)}, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, "next:" in done.stderr, "noise" in done.stderr) == (0, False, True)
    assert json.loads(done.stdout)["page"] == "a folder/report.html"
    assert (tmp_path / "opened").read_text() == (tmp_path / "a folder" / "report.html").as_uri()


def test_report_says_where_no_browser_can_be_opened(arms, runs, tmp_path, qcft, monkeypatch):
    for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    code, out, error = qcft("report", "frozen", "--runs", runs, "--to", "out", "--open")
    assert (code, "out/report.html" in out.splitlines()) == (0, True)
    assert "no browser could be opened: there is no display" in error
    assert "next: open out/report.html in a browser" in error


@pytest.mark.parametrize("names", [["nope"], ["frozen", "nope"]])
def test_a_run_that_is_not_there(arms, runs, qcft, names, tmp_path):
    code, out, error = qcft("report", *names, "--runs", runs)
    assert code == 2
    assert out == ""
    assert "there is no run 'nope'" in error
    assert not (tmp_path / "report").exists()


def test_norms_of_layers_and_running_means():
    squares = {
        "model.layers.0.q_proj": 9.0,
        "model.layers.0.up_proj": 16.0,
        "model.layers.11.q_proj": 4.0,
        "lm_head": 1.0,
    }
    assert by_layer(squares) == {0: 5.0, 11: 2.0}
    assert running_mean([3.0, 6.0, 9.0, 12.0]) == [3.0, 4.5, 6.0, 9.0]


def test_what_arms_set_has_no_folders_of_this_machine(arms, runs):
    first, second, *_ = arms_of([api.evidence(name, runs) for name in arms])
    sets = {"phase2.data": [{"path": "/home/me/es.jsonl", "lang": "es"}], "phase2.system": "/no_think"}
    compared = (first, replace(second, sets=sets))
    shown = f"{arms_section(compared)} {commands(compared)}"
    assert "/home/me" not in shown
    assert shown.count("es.jsonl") >= 3  # table, its records, command
    assert "/no_think" in shown
