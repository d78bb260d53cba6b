"""Ablations: arms expanded and checked as a whole, shared steps run once, failures that leave the others going."""

import csv
import json
import shutil
import subprocess
import sys

import pytest
import yaml

import qcft
from qcft.ablation.arms import prepare_arms
from qcft.ablation.dry_run import ablation_plan
from qcft.events import ArmChanged, StepBegun, Watch
from qcft.files import read_json
from qcft.models.meta import model_without_weights
from qcft.prepare.checks import check_prepared
from qcft.recipe import built_in_recipes, expand_ablation, load_recipe, recipe_from
from qcft.runner.planned import PlannedRecipe
from qcft.store.ablations import AblationIndex, run_states
from qcft.terminal import ablation_view

from .helpers.tiny import make_llama, make_recipe

ARMS = [
    {"name": "plain", "set": {"phase2.replay": None, "phase2.freeze": "none"}},
    {"name": "er", "set": {"phase2.freeze": "none"}, "grid": {"phase2.replay.ratio": [0.1, 0.2]}},
    {"name": "lf", "set": {"phase2.replay": None, "phase2.freeze": "random:0.5"}},
    {"name": "mixed", "mixed": True, "set": {"phase2.freeze": "none"}},
]


@pytest.fixture
def raw(raw_recipe):
    return {**raw_recipe, "ablation": {"arms": ARMS, "seeds": [0, 1]}}


@pytest.fixture
def recipe_file(raw, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def ablate(path, runs, **options):
    events = []
    done = qcft.ablate(path, runs=runs, listener=events.append, **options)
    return done, events


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The place of one finished ablation that several tests look at."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture(scope="module")
def done(finished, tiny_model, color_data):
    path = finished / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({**make_recipe(tiny_model, color_data), "ablation": {"arms": ARMS, "seeds": [0, 1]}})
    )
    return ablate(path, finished / "runs", seeds=[0])


def states(ablation):
    return {state.run: state.state for state in ablation.states()}


# --- arms


def test_grids_are_crossed_and_every_value_is_in_the_arms_name(raw):
    raw["ablation"] = {
        "seeds": [3],
        "arms": [{"name": "a", "grid": {"phase2.replay.ratio": [0.1, 0.2]}}, {"name": "b"}],
        "grid": {"phase2.freeze": {"all": "none", "low": "first:1"}, "lora.rslora": [True]},
    }
    _, arms = expand_ablation(raw)
    assert [one.arm for one in arms] == [
        "a-ratio-0.1-all-rslora-true", "a-ratio-0.1-low-rslora-true",
        "a-ratio-0.2-all-rslora-true", "a-ratio-0.2-low-rslora-true",
        "b-all-rslora-true", "b-low-rslora-true",
    ]  # fmt: skip
    low = arms[3].recipe
    assert (str(low.phase("phase2").freeze), low.phase("phase2").replay.ratio, low.lora.rslora) == (
        "first:1",
        0.2,
        True,
    )
    assert low.name == "tiny-a-ratio-0.2-low-rslora-true-s3"
    assert low.seed == 3
    assert low.ablation is None


def test_without_seeds_the_recipes_own_is_taken_and_what_is_set_comes_before_the_arms(raw):
    del raw["ablation"]["seeds"]
    _, arms = expand_ablation(raw, {"seed": 7, "phase2.freeze": "last:1", "phase2.train.lr": 1e-3})
    assert {one.seed for one in arms} == {7}
    by_name = {one.arm: one.recipe.phase("phase2") for one in arms}
    assert str(by_name["plain"].freeze) == "none"
    assert {phase.train.lr for phase in by_name.values()} == {1e-3}


def test_paths_in_an_arm_are_relative_to_the_recipe(raw, color_data, tmp_path):
    shutil.copytree(color_data, tmp_path / "there" / "data")
    raw["ablation"] = {"arms": [{"name": "other", "set": {"phase2.data": [{"path": "data/es.jsonl", "lang": "es"}]}}]}
    path = tmp_path / "there" / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    from qcft.recipe import load_ablation

    _, (arm,) = load_ablation(path)
    assert arm.recipe.phase("phase2").data[0].path == str(tmp_path / "there" / "data" / "es.jsonl")


@pytest.mark.parametrize(
    ("ablation", "says"),
    [
        ({"arms": [{"name": "a"}, {"name": "a"}]}, "two arms are named 'a'"),
        ({"arms": []}, "there are no arms"),
        ({"arms": [{"name": "a/b"}]}, "'a/b' cannot name an arm"),
        ({"arms": [{"name": "a"}], "seeds": [0, 0]}, "0 is given twice"),
        ({"arms": [{"name": "a"}], "seeds": [-1]}, "ablation.seeds.0"),
        ({"arms": [{"name": "a", "sett": {}}]}, "unknown key 'ablation.arms.0.sett'"),
        ({"grid": {"phase2.replay": [{"ratio": 0.1}]}}, "not a plain value"),
        ({"grid": {"set": {"x": 1}}}, "stands for a mapping of keys"),
        ({"arms": [{"name": "a"}, {"name": "b", "set": {"phase2.train.lr": "fast"}}]}, "arm 'b': phase2.train.lr"),
        ({"arms": [{"name": "b", "set": {"phase3.freeze": "none"}}]}, "arm 'b': phase3.freeze"),
        ({"arms": [{"name": "b", "set": {"phase2.data": "nowhere.jsonl"}}]}, "arm 'b': data: there is no file"),
        ({"arms": [{"name": "b", "set": {"phase2.freeze": "first:9"}}]}, "arm 'b': freeze: 'first:9'"),
        ({"arms": [{"name": "b", "mixed": True, "set": {"phase1.lr": 1}}]}, "arm 'b': unknown key 'phase1.lr'"),
        ({"arms": [{"name": "b", "match": "steps"}]}, "match: steps is for an arm that is mixed"),
        ({"arms": [{"name": "b", "mixed": True, "match": "rows"}]}, "ablation.arms.0.match"),
    ],
)
def test_a_mistake_in_an_arm_is_found_before_anything_is_written(qcft, raw, tmp_path, ablation, says):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**raw, "ablation": ablation}))
    code, out, err = qcft("ablate", path, "--in-process")
    assert code == 2
    assert says in err.splitlines()[-2], err
    assert err.splitlines()[-1].startswith("hint: ")
    assert out == ""
    assert not (tmp_path / "runs").exists()


def test_an_arm_or_seed_that_is_not_there(qcft, recipe_file):
    for flags, says in (
        (["--arms", "plane"], "there is no arm 'plane'"),
        (["--seeds", "5"], "there is no seed 5"),
        (["--seeds", "x"], "'x' is not a whole number"),
    ):
        code, _, err = qcft("ablate", recipe_file, *flags)
        assert code == 2
        assert says in err
    assert "did you mean 'plain'" in qcft("ablate", recipe_file, "--arms", "plane")[2]


def test_arms_are_listed_and_chosen_by_patterns(qcft, recipe_file, color_data):
    """Without any data being read."""
    code, out, err = qcft("ablate", recipe_file, "--list", "--arms", "er-*,mixed", "--json", "--set", "model=nowhere/x")
    assert code == 0, err
    listed = json.loads(out)
    assert [one["arm"] for one in listed] == ["er-ratio-0.1", "er-ratio-0.2", "mixed"]
    assert listed[0] == {
        "arm": "er-ratio-0.1",
        "seeds": [0, 1],
        "set": {"phase2.freeze": "none", "phase2.replay.ratio": 0.1},
        "mixed": False,
    }
    out = qcft("ablate", recipe_file, "-l")[1]
    assert 'phase2.freeze="random:0.5"' in out
    code, _, err = qcft("ablate", recipe_file, "--list", "--arms", "x*")
    assert code == 2
    assert "there is no arm 'x*'" in err


def test_a_plan_lists_all_arms_and_what_is_missing(qcft, raw, tmp_path):
    raw["ablation"] = {"arms": [{"name": "plain"}, {"name": "other", "set": {"model.name": "nowhere/at-all"}}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    code, out, err = qcft("ablate", "recipe.yaml", "--dry-run", "--json")
    assert code == 2
    plan = json.loads(out)
    assert [run["arm"] for run in plan["runs"]] == ["plain", "other"]
    assert list(plan["missing"]) == ["tiny-other-s0"]
    assert plan["total"]["steps"] == plan["runs"][0]["steps"] == 10
    code, out, err = qcft("ablate", "recipe.yaml", "--dry-run")
    assert code == 2
    assert "missing: arm 'other': model: 'nowhere/at-all'" in err
    assert out.splitlines()[2].split() == ["tiny-other-s0", *"?????"]
    assert qcft("ablate", "recipe.yaml", "--dry-run", "--arms", "plain")[0] == 0


def test_a_recipe_without_arms_says_so(qcft, raw_recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw_recipe))
    code, _, err = qcft("ablate", path)
    assert code == 2
    assert "has no ablation" in err


# --- fairness


def test_every_arm_measures_the_same_rows_and_trains_none_of_them(raw):
    found = prepare_arms(expand_ablation(raw)[1], Watch())
    groups = {tuple((g.name, g.rows) for g in one.prepared.groups) for one in found}
    assert len(groups) == 1
    ((english, spanish, portuguese),) = groups
    assert [name for name, _ in (english, spanish, portuguese)] == ["phase1 en", "phase2 es", "phase2 pt"]
    held = {row.key for _, rows in (english, spanish, portuguese) for row in rows}
    for one in found:
        assert not held & {row.key for sets in one.prepared.rows.values() for rows in sets for row in rows}
    # The same number of new rows in each arm, and of all rows in the mixed one.
    counts = {one.arm.arm: sum(map(len, one.prepared.rows["phase2"])) for one in found}
    assert counts == {"plain": 24, "er-ratio-0.1": 24, "er-ratio-0.2": 24, "lf": 24, "mixed": 48}


def test_arms_on_different_data_measure_the_rows_of_all(raw, color_data):
    raw["ablation"] = {
        "arms": [
            {"name": "es", "set": {"phase2.data": [{"path": str(color_data / "es.jsonl"), "lang": "es", "take": 12}]}},
            {"name": "pt", "set": {"phase2.data": [{"path": str(color_data / "pt.jsonl"), "lang": "pt", "take": 12}]}},
        ]
    }
    raw["phases"][1]["replay"] = None
    found = prepare_arms(expand_ablation(raw)[1], Watch())
    for one in found:
        assert [g.name for g in one.prepared.groups] == ["phase1 en", "phase2 es", "phase2 pt"]
    probes = [{s.id for s in one.prepared.plan.steps if s.stage.startswith("eval/base")} for one in found]
    assert probes[0] == probes[1]


def test_the_run_of_an_arm_is_the_same_run_when_its_recipe_is_run(raw):
    """The recipe that an arm's run keeps gives the same steps: what `qcft merge` and others go by."""
    for one in prepare_arms(expand_ablation(raw)[1], Watch()):
        again = PlannedRecipe(recipe_from(one.arm.recipe.model_dump(mode="json")), Watch())
        assert again.plan.stages() == one.prepared.plan.stages()


def test_the_mixed_arm_has_the_answer_tokens_of_both_phases(done):
    """To the nearest row: phase 1 has two epochs here."""
    ablation, _ = done
    metrics = {
        state.arm: [read_json(ablation.runs / state.run / p / "done.json") for p in ("phase1", "phase2")]
        for state in ablation.states()
        if state.seed == 0
    }
    fed = {
        arm: [entry for record in records if record for entry in record["metrics"]["exposure"]]
        for arm, records in metrics.items()
    }
    tokens = {arm: sum(entry["answer_tokens"] for entry in entries) for arm, entries in fed.items()}
    assert metrics["mixed"][0] is None
    longest = max(round(entry["answer_tokens"] / entry["rows"]) + 1 for entry in fed["mixed"])
    assert abs(tokens["mixed"] - tokens["plain"]) <= longest / 2
    assert sum(entry["rows"] for entry in fed["mixed"]) != sum(entry["rows"] for entry in fed["plain"]), "not by rows"


def test_a_mixed_arm_matches_in_the_unit_that_it_says(raw):
    """With one epoch in each phase, as many answer tokens are every row once; steps are the phases' own."""
    raw["phases"][0]["train"]["epochs"] = 1
    raw["ablation"] = {"arms": [{"name": "tokens", "mixed": True}, {"name": "steps", "mixed": True, "match": "steps"}]}
    found = {one.arm.arm: one for one in prepare_arms(expand_ablation(raw)[1], Watch())}
    trains = {name: one.arm.recipe.phases[0].train for name, one in found.items()}
    assert (trains["tokens"].steps, trains["tokens"].epochs) == (None, 1.0)
    assert trains["steps"].steps == 6 + 6
    assert [one.arm.match for one in found.values()] == ["tokens", "steps"]


def test_the_plan_shows_how_long_each_arm_trains(raw, tmp_path):
    """Optimizer steps, answer tokens, epochs of each phase; replay's share in both units."""
    plan = ablation_plan(expand_ablation(raw)[1], tmp_path / "runs", Watch())
    of = {run["arm"]: run["training"] for run in plan["runs"] if run["seed"] == 0}
    assert of["plain"]["epochs"] == of["lf"]["epochs"] == [2.0, 1.0]
    assert of["plain"]["steps"] == 18
    assert of["plain"]["replay"] == {}
    assert of["mixed"]["answer_tokens"] == pytest.approx(of["plain"]["answer_tokens"], abs=4)
    replayed = of["er-ratio-0.2"]
    assert replayed["replay"]["phase2"]["rows"] == 6
    assert replayed["replay"]["phase2"]["share_of_rows"] == 0.2
    assert replayed["replay_answer_tokens"] == replayed["replay"]["phase2"]["answer_tokens"] > 0
    assert replayed["answer_tokens"] == of["plain"]["answer_tokens"]


def test_what_arms_share_is_read_once(raw, monkeypatch):
    from qcft.prepare import reading

    read = []
    load = reading.load_source
    monkeypatch.setattr(reading, "load_source", lambda source, *rest: read.append(source) or load(source, *rest))
    prepare_arms(expand_ablation(raw)[1], Watch())
    assert len(read) == len({source.path for source in read}) == 3
    assert model_without_weights.__doc__


# --- running


def test_shared_steps_run_once_and_a_second_ablation_does_nothing(done, finished):
    ablation, _ = done
    again, events = ablate(finished / "recipe.yaml", finished / "runs", seeds=[0])
    assert {e.state for e in events if isinstance(e, StepBegun)} == {"reused"}
    assert set(states(again).values()) == {"done"}
    assert [e.state for e in events if isinstance(e, ArmChanged)][-1] == "done"
    runs = [read_json(ablation.runs / name / "run.json")["stages"] for name in states(ablation)]
    steps = {step for stages in runs for step in stages.values()}
    assert len([p for p in (ablation.runs / ".steps").iterdir() if p.is_dir() and "prefix" not in p.name]) == len(steps)
    assert len(steps) == 19
    assert sum(map(len, runs)) == 42


def test_what_is_left_on_disk(done):
    ablation, _ = done
    document = json.loads((ablation.folder / "ablation.json").read_text())
    assert (document["version"], document["name"], document["working"]) == (1, "tiny", {})
    assert recipe_from(document["recipe"]).ablation is not None
    assert document["runs"][1] == {
        "arm": "er-ratio-0.1",
        "seed": 0,
        "run": "tiny-er-ratio-0.1-s0",
        "set": {"phase2.freeze": "none", "phase2.replay.ratio": 0.1},
        "mixed": False,
        "error": None,
    }
    assert (ablation.runs / "tiny-er-ratio-0.1-s0" / "report" / "report.md").is_file()


def test_the_table_of_arms(qcft, done, finished):
    code, out, err = qcft("ablate", finished / "recipe.yaml", "--runs", finished / "runs", "--seeds", "0", "--json",
                          "--in-process")  # fmt: skip
    assert code == 0, err
    outcome = json.loads(out)
    arms = {arm["arm"]: arm for arm in outcome["arms"]}
    assert list(arms) == ["plain", "er-ratio-0.1", "er-ratio-0.2", "lf", "mixed"]
    table = json.loads(qcft("show", "tiny-lf-s0", "--runs", finished / "runs", "--json")[1])
    change = next(c for c in table["changes"] if c["from"] == "eval/base")["groups"]
    tokens = {name: group["answer_tokens"] for name, group in table["stages"][-1]["groups"].items()}
    others = ("phase2 es", "phase2 pt")
    assert arms["lf"]["english"]["mean"] == pytest.approx(change["phase1 en"]["value"])
    assert arms["lf"]["others"]["mean"] == pytest.approx(
        sum(change[name]["value"] * tokens[name] for name in others) / sum(tokens[name] for name in others)
    )
    assert arms["lf"]["steps"]["mean"] == 18
    assert arms["lf"]["epochs"] == [2.0, 1.0]
    assert arms["mixed"]["answer_tokens"]["mean"] == pytest.approx(arms["lf"]["answer_tokens"]["mean"], abs=4)
    assert arms["mixed"]["english_untrained"] is None
    code, shown, _ = qcft("show", "tiny", "--runs", finished / "runs")
    assert (code, shown.splitlines()[0].split()[:3]) == (0, ["arm", "seeds", "done"])
    assert "mean of the seeds; `qcft report tiny` shows which arms differ clearly\n" in shown
    assert shown.endswith("in brackets compared with plain\n")
    assert " 2 + 1 " in shown
    assert json.loads(qcft("show", "tiny", "--runs", finished / "runs", "--json")[1]) == outcome


def test_the_page_of_an_ablation(done, finished):
    """It is there at the end, and what an arm kept of English counts from one stage for all arms, mixed ones too."""
    page = (finished / "runs" / "tiny" / "report" / "report.md").read_text()
    question, answer = page.splitlines()[2:4]
    assert "Which of 5 arms kept the most English for the most gain in es and pt?" in question
    assert answer.removeprefix("**").startswith("No winner is named. One run each")
    assert "`qcft ablate RECIPE --seeds 0,1,2`" in answer.replace("\\", "")
    rows = csv.DictReader((finished / "runs" / "tiny" / "report" / "tables" / "stages.csv").open())
    nll = {
        (r["arm"], r["stage"]): float(r["value"])
        for r in rows
        if (r["measure"], r["language"], r["precision"]) == ("nll", "en", "NF4")
    }
    lost = nll["mixed", "phase2"] - nll["plain", "phase1"]
    assert f"{lost:+.3f} since phase1" in next(line for line in page.splitlines() if line.startswith("| mixed"))
    assert "all but mixed" in page


def test_the_plan_of_an_ablation(qcft, done, finished):
    """Seed 1 is to do: what it will take is estimated from seed 0."""
    code, out, _ = qcft("ablate", finished / "recipe.yaml", "--runs", finished / "runs", "--dry-run", "--json")
    assert code == 0
    plan = json.loads(out)
    todo = [step for step in plan["steps"] if step["state"] == "to do"]
    assert plan["total"]["steps"] == len(plan["steps"]) == 36  # 19, and again all but the base's two measurements
    assert plan["total"]["done"] == 19
    assert len(todo) == 17
    assert all(step["seconds"] > 0 for step in todo)
    assert plan["total"]["seconds"] == pytest.approx(sum(step["seconds"] for step in todo))
    assert plan["total"]["unknown"] == 0
    base = next(step for step in plan["steps"] if step["title"] == "measure base, NF4")
    assert len(base["runs"]) == 10
    assert not (finished / "runs" / "tiny-plain-s1").exists()
    code, out, _ = qcft("ablate", finished / "recipe.yaml", "--runs", "nowhere", "--dry-run")
    assert "24 steps unknown" in out, "without any done step, only trainings are estimated"


def test_a_step_of_almost_no_time_is_not_unknown(capsys):
    for seconds, unknown, says in ((0.004, 3, "0.0 s + 3 steps unknown"), (0.0, 1, "0.0 s + 1 step unknown"),
                                   (None, 2, "time left unknown"), (70, 0, "time left 1 min 10 s, disk")):  # fmt: skip
        total = {"steps": 9, "shared": 2, "done": 1, "seconds": seconds, "bytes": 10, "unknown": unknown}
        ablation_view.print_plan({"runs": [], "missing": {}, "total": total})
        assert says in capsys.readouterr().out


def test_processes_that_note_arms_of_one_ablation_at_once_lose_nothing(done, tmp_path):
    """Each note is a change of one file."""
    (tmp_path / "tiny").mkdir()
    shutil.copy(done[0].folder / "ablation.json", tmp_path / "tiny")
    code = "from pathlib import Path; from qcft.store.ablations import AblationIndex"
    code += f"; a = AblationIndex(Path({str(tmp_path)!r}), 'tiny')"
    notes = [f"{code}\nfor i in range(60): a.begin('{who}' + str(i))" for who in "xy"]
    processes = [subprocess.Popen([sys.executable, "-c", note]) for note in notes]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(read_json(tmp_path / "tiny" / "ablation.json")["working"]) == 120


def test_a_failing_arm_does_not_stop_the_others_and_is_retried(qcft, raw, tmp_path):
    """An lr at which the loss is not finite; another arm that depends on the same step is not tried."""
    raw["ablation"] = {
        "arms": [
            {"name": "wild", "set": {"phase2.train.lr": 1e30, "phase2.replay": None}},
            {"name": "same", "set": {"phase2.train.lr": 1e30, "phase2.replay": None, "phase2.train.report_to": []}},
            ARMS[0],
        ]
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    code, _, err = qcft("ablate", path, "--in-process")
    assert code == 1
    assert "tiny-wild-s0 failed: train phase2: the loss is" in err
    assert "tiny-same-s0 failed: train phase2: it depends on train-" in err
    ablation = AblationIndex(tmp_path / "runs", "tiny")
    assert states(ablation) == {"tiny-wild-s0": "failed", "tiny-same-s0": "failed", "tiny-plain-s0": "done"}
    listed = {row["run"]: row["state"] for row in json.loads(qcft("ls", "--json")[1])}
    assert listed == {"tiny": "failed", **states(ablation)}
    # With the recipe fixed, the arm is run; steps that are done are reused.
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs" / ".steps").glob("*/done.json")}
    raw["ablation"]["arms"][0]["set"]["phase2.train.lr"] = 1e-3
    path.write_text(yaml.safe_dump(raw))
    code, _, err = qcft("ablate", path, "--in-process", "--arms", "wild,plain")
    assert code == 0, err
    assert states(ablation) == {"tiny-wild-s0-2": "done", "tiny-same-s0": "failed", "tiny-plain-s0": "done"}
    assert all(p.stat().st_mtime_ns == then for p, then in before.items())


def test_other_settings_are_another_ablation_and_other_arms_the_same(done, finished):
    other, _ = ablate(finished / "recipe.yaml", finished / "runs", set={"lora.r": 2}, arms=["mixed"], seeds=[0])
    assert other.name == "tiny-2"
    assert [state.run for state in other.states()] == ["tiny-mixed-s0-2"]
    assert run_states(finished / "runs")[0]["tiny-mixed-s0"] == "done"
    again, _ = ablate(finished / "recipe.yaml", finished / "runs", arms=["lf"], seeds=[0])
    assert again.name == "tiny"
    assert len(again.states()) == 5


def test_run_uses_the_plain_recipe_and_says_so(qcft, recipe_file):
    code, out, err = qcft("run", recipe_file, "--dry-run")
    assert code == 0
    assert "`qcft ablate` runs the arms" in err
    assert "train phase2" in out


# --- the recipes that ship

ARMS_OF = {
    "quick-ablation-cpu": 6,
    "beyond": 15,
    "free-remedies": 7,
    "lora-baseline": 12,
    "ablation-8gb": 27,
    "paper-small": 10,
    "paper-mistral-7b": 58,
    "paper-llama3-8b": 58,
}
ON_SHIPPED_DATA = ["quick-ablation-cpu", "beyond", "free-remedies", "lora-baseline"]


def test_every_recipe_that_ships_is_in_these_tests():
    assert {name for name in built_in_recipes() if load_recipe(name).ablation} == ARMS_OF.keys()
    paths = {name: [one.path for phase in load_recipe(name).phases for one in phase.sources()] for name in ARMS_OF}
    assert {name for name in ARMS_OF if all(path.startswith("qcft:") for path in paths[name])} == {*ON_SHIPPED_DATA}


@pytest.mark.parametrize("command", ["ablate", "run"])
@pytest.mark.parametrize("name", ON_SHIPPED_DATA)
def test_a_recipe_on_shipped_data_is_planned_as_it_ships(qcft, tokenizer, tmp_path, name, command):
    """With another model alone, as deep as theirs: the arms' data, freezing and rows are theirs."""
    smaller = ["--set", f"model.name={make_llama(tmp_path / 'deep', tokenizer, layers=30)}"]
    code, out, err = qcft(command, name, *smaller, "--dry-run", "--json", "-q")
    assert code == 0, err
    planned = json.loads(out)
    if command == "ablate":
        assert len(planned["runs"]) == ARMS_OF[name]
    else:
        assert "train phase2" in {step["title"] for step in planned}


@pytest.mark.parametrize("name", ARMS_OF)
def test_a_recipe_that_ships_expands(name):
    """Every arm is a whole recipe; hub ids are not asked for."""
    from qcft.recipe import load_ablation

    plain, arms = load_ablation(name)
    assert len(arms) == ARMS_OF[name]
    assert all(one.recipe.ablation is None for one in arms)
    assert all(one.recipe.name == f"{name}-{one.arm}-s{one.seed}" for one in arms)
    others = {phase.name for phase in plain.phases} if any(one.as_long_as for one in arms) else set()
    assert {m.name for m in arms[0].recipe.heldout.of} == others  # arms on other data measure all arms' rows
    assert len({json.dumps([m.model_dump() for m in one.recipe.heldout.of]) for one in arms}) == 1


def test_the_papers_grid():
    from qcft.recipe import load_ablation

    _, arms = load_ablation("paper-mistral-7b")
    by_name = {one.arm: one.recipe for one in arms}
    for start in ("alpaca", "orca", "instruct"):
        for data in ("multialpaca", "mopenorca"):
            for arm in ("none", "gr5", "gr10", "er5", "er10", "lf-h1", "lf-h2", "spectrum", "lora"):
                recipe = by_name[f"{arm}-{start}-{data}"]
                assert len(recipe.phases) == (1 if start == "instruct" else 2)
                assert data in recipe.phases[-1].data[0].path
            assert (f"mixed-{start}-{data}" in by_name) == (start != "instruct")
    assert by_name["gr5-orca-mopenorca"].phases[0].data[0].path == "Open-Orca/SlimOrca"
    assert by_name["lf-h2-instruct-multialpaca"].model.base == "mistralai/Mistral-7B-v0.1"
    assert {one.match for one in arms if one.arm.startswith("mixed")} == {"steps"}
    assert [s.path for s in by_name["mixed-orca-multialpaca"].phases[0].sources()][:2] == [
        "Open-Orca/SlimOrca",
        "data/multialpaca/fr.jsonl",
    ]


def test_the_quick_ablation_is_checked_completely(tiny_model):
    """As it ships, down to its rows as tokens; only the model and what depends on its depth are others."""
    from qcft.recipe import load_ablation

    smaller = {"model.name": str(tiny_model), "phase1.train.max_length": 1024, "phase2.train.max_length": 1024}
    _, arms = load_ablation("quick-ablation-cpu", smaller)
    found = {one.arm.arm: one for one in prepare_arms(arms, Watch())}
    for name, one in found.items():
        if name != "first20":
            check_prepared(one.prepared)
    groups = {group.name: len(group.rows) for group in found["none"].prepared.groups}
    assert list(groups) == ["phase1 en", "phase2 es", "phase2 pt", "phase2 fr", "test en"]
    assert min(groups.values()) >= 16
    train = found["mixed"].arm.recipe.phases[0].train
    assert (train.steps, train.epochs) == (None, 1.0)  # each row once, as the phases have them
