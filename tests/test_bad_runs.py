"""Finished runs that were damaged, or whose data is gone: nothing false is shown, nothing is trained again."""

import json
import re
import shutil

import pytest
import yaml

from qcft import InputError
from qcft.events import Watch
from qcft.files import read_json, read_sealed, write_json
from qcft.recipe import recipe_from
from qcft.store import Store
from qcft.store.ablations import AblationIndex, open_ablation, run_states
from qcft.store.opened import read_begun

from .helpers.bad_input import check_refused, listing
from .helpers.tiny import make_recipe

COMMANDS = [
    ("run", "recipe.yaml"),
    ("dial", "tiny", "--scales", "0,1"),
    ("drift", "tiny", "--rows", "2"),
    ("merge", "tiny"),
]
KINDS = {"train", "probe", "merge", "kept", "replay", "layers", "dial", "drift", "suite"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A place where the module's run is made once, by `whole`."""
    return tmp_path_factory.mktemp("made")


@pytest.fixture
def place(made, tiny_model, color_data, qcft, tmp_path, monkeypatch):
    """A folder with data, recipe and a finished run that has a step of every kind; each test has its own copy."""
    if not (made / "runs").exists():
        shutil.copytree(color_data, made / "data")
        recipe = make_recipe(tiny_model, made / "data")
        recipe["phases"][1]["freeze"] = "snr:0.5"
        recipe["evaluate"] = {"tasks": ["fidelity"], "fidelity": {"prompts": 2, "max_new_tokens": 4}}
        recipe["merge"] = {"refuse_below": None}
        (made / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        monkeypatch.chdir(made)
        for command in COMMANDS:
            code, _, error = qcft(*command, "-q")
            assert code == 0, error
        monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path, symlinks=True, dirs_exist_ok=True)
    own = (tmp_path / "runs/tiny/recipe.yaml").read_text().replace(str(made), str(tmp_path))
    (tmp_path / "runs/tiny/recipe.yaml").write_text(own)
    (tmp_path / "recipe.yaml").write_text((made / "recipe.yaml").read_text().replace(str(made), str(tmp_path)))
    return tmp_path


def stages(place):
    return read_json(place / "runs/tiny/run.json")["stages"]


def folder_of(place, stage):
    return place / "runs/.steps" / stages(place)[stage]


def flip(path, at=0.5, bit=1):
    """Change one bit."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= bit
    path.write_bytes(bytes(data))


def edit_scores(place, stage="eval/phase2"):
    """Halve the losses of one stage, as valid JSON."""
    file = folder_of(place, stage) / "scores.json"
    scores = {name: [{**one, "nll": one["nll"] / 9} for one in rows] for name, rows in read_json(file).items()}
    write_json(file, scores)


def replace_adapter(place, stage="phase2"):
    """Put another phase's adapter in an adapter's place, larger by a hundred."""
    from safetensors.torch import load_file, save_file

    file = folder_of(place, stage) / "adapter/adapter_model.safetensors"
    save_file({name: 10 * tensor for name, tensor in load_file(file).items()}, file)


def edit_data(place):
    """Edit a few rows of each language."""
    for file in (place / "data").glob("*.jsonl"):
        file.write_text(re.sub(r"(number|numero) 1", "which is ", file.read_text()))


def drop_data(place):
    shutil.rmtree(place / "data")


def test_the_run_has_a_step_of_every_kind(place):
    assert {step.split("-")[0] for step in stages(place).values()} == KINDS


# Files that are not as they were written

READERS = {
    "show of edited scores": (edit_scores, ["show"], "scores.json is missing or altered"),
    "report of edited scores": (edit_scores, ["report"], "scores.json is missing or altered"),
    "report of a replaced adapter": (replace_adapter, ["report"], "adapter_model.safetensors is missing or altered"),
    "drift of a replaced adapter": (
        replace_adapter,
        ["drift", "tiny", "--rows", "3", "-q"],
        "adapter_model.safetensors is missing or altered",
    ),
    "a dial of a replaced adapter": (
        replace_adapter,
        ["dial", "tiny", "--scales", "0.5", "-q"],
        "adapter_model.safetensors is missing or altered",
    ),
    "answers of a replaced adapter": (
        replace_adapter,
        ["compare", "tiny", "--prompt", "a cat", "-q"],
        "adapter_model.safetensors is missing or altered",
    ),
    "a merge of a replaced adapter": (
        replace_adapter,
        ["merge", "tiny", "--dtype", "float32", "-q"],
        "adapter_model.safetensors is missing or altered",
    ),
    "an export of a replaced adapter": (
        replace_adapter,
        ["export", "tiny", "--adapter-only", "--to", "out", "-q"],
        "adapter_model.safetensors is missing or altered",
    ),
    "layers of a replaced adapter": (
        lambda place: replace_adapter(place, "phase1"),
        ["layers", "tiny", "--no-snr"],
        "adapter_model.safetensors is missing or altered",
    ),
    "layers of a flipped model": (
        lambda place: flip(folder_of(place, "merged") / "model/model.safetensors"),
        ["layers", "tiny", "--snr"],
        "model.safetensors is missing or altered",
    ),
    "removing what is unused beside a step.json that cannot be read": (
        lambda place: flip(folder_of(place, "phase2") / "step.json"),
        ["gc", "--delete"],
        "step.json is missing or altered",
    ),
    **{
        f"{command[0]} of a flipped {name}": (
            lambda place, name=name: flip(folder_of(place, "eval/phase2") / name, 0.3),
            command,
            f"{name} is missing or altered",
        )
        for command in (["show"], ["report"])
        for name in ("done.json", "step.json")
    },
    **{
        f"report of a flipped {name}": (
            lambda place, stage=stage, name=name: flip(folder_of(place, stage) / name),
            ["report"],
            f"{name} is missing or altered",
        )
        for stage, name in (
            ("eval/phase2", "answers.json"),
            ("layers", "layers.json"),
            ("drift/merged-phase2", "drift.json"),
        )
    },
}


@pytest.mark.parametrize("case", READERS)
def test_what_is_altered_is_refused_and_named(place, qcft, case):
    damage, command, says = READERS[case]
    damage(place)
    check_refused(qcft, place, command, says)


def files_of_steps(place):
    """A file of every name and kind of step, with the stage it is of."""
    found = {}
    for stage, step in stages(place).items():
        for path in sorted((place / "runs/.steps" / step).rglob("*")):
            if path.is_file() and path.stat().st_size:
                name = path.relative_to(place / "runs/.steps" / step).as_posix()
                key = (step.split("-")[0], name)
                found[key] = stage if stage == "eval/phase2" else found.get(key, stage)
    return [(kind, stage, name) for (kind, name), stage in found.items()]


def test_a_flipped_bit_of_any_file_is_reported_or_changes_nothing(place, qcft):
    """Whatever file of whatever kind of step: what `show` prints is what it printed, or an error that names it."""
    code, good, _ = qcft("show", "--json")
    assert code == 0
    named = set()
    for kind, stage, name in files_of_steps(place):
        path = folder_of(place, stage) / name
        whole = path.read_bytes()
        for at in (0.1, 0.7):
            flip(path, at)
            code, out, error = qcft("show", "--json")
            assert "unexpected" not in error
            assert "Traceback" not in error
            if code == 0:
                assert out == good, (kind, name)
            else:
                assert (code, out) == (2, ""), error
                assert f"{name} is missing or altered" in error
                assert len(error.strip().splitlines()) == 2
                named.add(name)
            path.write_bytes(whole)
    assert {"done.json", "step.json", "scores.json"} <= named
    assert qcft("show", "--json")[1] == good


def test_the_hint_rebuilds_what_was_altered(place, qcft):
    """`qcft run` of the run's own recipe makes it whole again, and trains nothing."""
    before = qcft("show", "--json")[1]
    edit_scores(place)
    _, _, error = qcft("show")
    command = error.split("`")[1].split()
    assert command[:2] == ["qcft", "run"]
    code, _, error = qcft(*command[1:])
    assert code == 0, error
    assert "scores.json is missing or altered; the step is rebuilt" in error
    assert equal_groups(json.loads(qcft("show", "--json")[1]), json.loads(before))
    assert sorted(p.name for p in (place / "runs").iterdir() if p.name[0] != ".") == ["tiny"]


def equal_groups(one, other):
    return [stage["groups"] for stage in one["stages"]] == [stage["groups"] for stage in other["stages"]]


@pytest.mark.parametrize(
    ("stage", "name", "command"),
    [
        ("dial-phase2", "1/point.json", ["dial", "tiny", "--scales", "0,1"]),
        ("drift/merged-phase2", "drift.json", ["drift", "tiny", "--rows", "2"]),
        ("merged-phase2", "model/config.json", ["merge", "tiny"]),
        ("merged-phase2", "step.json", ["merge", "tiny"]),
        ("replay", "replay.jsonl", ["replay", "tiny"]),
    ],
)
def test_a_command_that_runs_steps_rebuilds_its_own(place, qcft, stage, name, command):
    file = folder_of(place, stage) / name
    whole = file.read_bytes()
    flip(file)
    code, _, error = qcft(*command)
    assert code == 0, error
    assert f"{name} is missing or altered" in error
    if name == "step.json":
        assert read_begun(file.parent)["inputs"] == json.loads(whole)["inputs"]
    else:
        assert Store(place / "runs").done(file.relative_to(place / "runs/.steps").parts[0]) is not None
    assert sorted(p.name for p in (place / "runs").iterdir() if p.name[0] != ".") == ["tiny"]


@pytest.mark.parametrize("damage", ["flipped", "gone", "cut", "edited"])
def test_a_damaged_step_json_is_written_again(place, qcft, damage):
    """Inputs are known from the plan; no done step is done again for it."""
    file = folder_of(place, "phase2") / "step.json"
    inputs = read_sealed(file)["inputs"]
    done = {path: path.read_bytes() for path in (place / "runs/.steps").glob("*/done.json")}
    if damage == "flipped":
        flip(file, 0.4)
    elif damage == "gone":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:50])
    else:  # without a seal, as earlier versions wrote it
        document = read_sealed(file)
        document["inputs"]["settings"]["seed"] = 5
        write_json(file, document)
    assert qcft("show", "--json")[0] in {0, 2}
    code, _, error = qcft("run", "recipe.yaml")
    assert code == 0, error
    assert error.count("step.json is missing or altered; it is written again") == 1
    assert read_sealed(file)["inputs"] == inputs
    assert {path: path.read_bytes() for path in done} == done
    code, _, error = qcft("report")
    assert code == 0, error


def test_a_step_json_without_a_seal_is_read(place, qcft):
    """As earlier versions wrote it."""
    for file in (place / "runs/.steps").glob("*/step.json"):
        write_json(file, read_sealed(file))
    before = listing(place / "runs/.steps")
    code, _, error = qcft("run", "recipe.yaml")
    assert code == 0, error
    assert "altered" not in error
    assert listing(place / "runs/.steps") == before


def test_an_altered_log_draws_no_curve(place, qcft):
    file = folder_of(place, "phase2") / "log.jsonl"
    file.write_text(file.read_text().replace('"loss": ', '"loss": 9'))
    code, _, error = qcft("report")
    assert code == 0, error
    page = (place / "runs/tiny/report/report.md").read_text()
    assert "training-phase1" in page
    assert "training-phase2" not in page


# Data and models that changed or are gone

DELIVERIES = {
    "merge": ["merge", "tiny", "-q"],
    "export": ["export", "tiny", "--to", "out", "-q"],
    "export of an adapter": ["export", "tiny", "--adapter-only", "--to", "out", "-q"],
    "export of phase 1": ["export", "tiny", "--stage", "phase1", "--to", "out", "-q"],
    "dial": ["dial", "tiny", "--scales", "0,1", "-q"],
    "replay": ["replay", "tiny", "-q"],
    "drift": ["drift", "tiny", "--rows", "2", "-q"],
    "report": ["report", "tiny"],
    "show": ["show"],
}


@pytest.mark.parametrize("lose", [edit_data, drop_data])
@pytest.mark.parametrize("case", DELIVERIES)
def test_what_a_run_has_is_delivered_without_its_data(place, qcft, case, lose):
    lose(place)
    before = {path.name for path in (place / "runs/.steps").iterdir() if path.name[0] != "."}
    code, _, error = qcft(*DELIVERIES[case])
    assert code == 0, error
    assert {path.name for path in (place / "runs/.steps").iterdir() if path.name[0] != "."} == before
    assert sorted(path.name for path in (place / "runs").iterdir() if path.name[0] != ".") == ["tiny"]
    assert "out" not in DELIVERIES[case] or (place / "out/README.md").is_file()


@pytest.mark.parametrize("case", ["export", "export of an adapter", "export of phase 1", "report", "show"])
def test_what_a_run_has_is_delivered_without_its_model(place, qcft, case):
    """The data gone with it."""
    drop_data(place)
    own = place / "runs/tiny/recipe.yaml"
    document = yaml.safe_load(own.read_text())
    document["model"]["name"] = str(place / "gone")
    own.write_text(yaml.safe_dump(document))
    code, _, error = qcft(*DELIVERIES[case])
    assert code == 0, error
    if "out" in DELIVERIES[case]:
        assert (place / "out/tokenizer_config.json").is_file()


@pytest.mark.parametrize("command", [["compare", "tiny", "--prompt", "a cat"], ["chat", "tiny"]])
def test_a_model_that_is_gone_gives_no_answers(place, qcft, command):
    own = place / "runs/tiny/recipe.yaml"
    own.write_text(own.read_text().replace("name: /", "name: /gone/", 1))
    check_refused(qcft, place, [*command, "-q"], "/gone/")


def test_answers_to_given_prompts_need_no_data(place, qcft):
    drop_data(place)
    code, out, error = qcft("compare", "tiny", "--prompt", "a cat", "--json", "-q")
    assert code == 0, error
    assert json.loads(out)["stages"] == ["base", "phase1", "phase2"]


@pytest.mark.parametrize(("lose", "why"), [(edit_data, "changed since the run"), (drop_data, "cannot be read")])
def test_a_new_merge_without_data_is_made_and_not_measured(place, qcft, lose, why):
    lose(place)
    code, out, error = qcft("merge", "tiny", "--dtype", "float32", "--to", "out", "--json")
    assert code == 0, error
    output = json.loads(out)
    assert output["stage"] == "merged-phase2-float32"
    assert output["kept"] is None
    assert "what the merge kept is not measured" in error
    assert why in error
    assert (place / "out/model.safetensors").is_file()
    assert sorted(path.name for path in (place / "runs").iterdir() if path.name[0] != ".") == ["tiny"]
    assert qcft("gc")[0] == 0


REFUSED = {
    "a dial of other scales": ["dial", "tiny", "--scales", "0.5", "-q"],
    "answers to held-out rows": ["compare", "tiny", "-q"],
    "a drift between others": ["drift", "tiny", "--from", "base", "-q"],
    "replay of another ratio": ["replay", "tiny", "--ratio", "0.1", "-q"],
    "an evaluation": ["eval", "tiny", "--task", "fidelity", "--stage", "base", "--limit", "1", "-q"],
    "another phase 2": ["phase2", "tiny", "--freeze", "first:2", "-q"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_needs_rows_that_changed_is_refused(place, qcft, case):
    edit_data(place)
    check_refused(qcft, place, REFUSED[case], "changed since the run 'tiny' was made")


@pytest.mark.parametrize("case", ["a dial of other scales", "a drift between others", "answers to held-out rows"])
def test_what_needs_rows_that_are_gone_is_refused(place, qcft, case):
    drop_data(place)
    check_refused(qcft, place, REFUSED[case], "the held-out rows of the run 'tiny' cannot be read")


def test_a_drift_over_a_text_file_needs_no_data(place, qcft):
    drop_data(place)
    (place / "text.txt").write_text("the cat runs\nwhat is a dog\n")
    code, out, error = qcft("drift", "tiny", "--text", "en=text.txt", "--json", "-q")
    assert code == 0, error
    assert json.loads(out)["text"]["en"]["rows"] == 2


def test_a_phase_that_is_not_done_is_not_merged(place, qcft):
    (folder_of(place, "phase2") / "done.json").unlink()
    check_refused(qcft, place, ["merge", "tiny", "--dtype", "float32", "-q"], "phase2 of the run 'tiny' is not done")


# Versions, and other runs


def test_resuming_under_other_versions_is_reported(tmp_path):
    store, events = Store(tmp_path), []
    with store.claim("train-1", {"a": 1}, Watch()) as folder:
        begun = read_sealed(folder / "step.json")
    begun["versions"] |= {"torch": "1.0", "python": "2.7"}
    write_json(folder / "step.json", begun)
    with store.claim("train-1", {"a": 1}, Watch(events.append)):
        pass
    (note,) = events
    assert "train-1 is resumed with other versions than it was started with: python 2.7 -> " in note.text
    assert ", torch 1.0 -> " in note.text


def broken_runs(place):
    """Beside the run: an ablation and a run that cannot be read, a run of a newer qcft."""
    texts = {
        "bad/ablation.json": '{"version": 1, "runs": [{"arm": "a"}]}',
        "newer/run.json": '{"version": 99, "stages": {}}',
        "broken/run.json": '{"version": 1, "stages": {"pha',
    }
    for name, text in texts.items():
        (place / "runs" / name).parent.mkdir()
        (place / "runs" / name).write_text(text)


def test_what_cannot_be_read_hides_no_other_run(place, qcft):
    broken_runs(place)
    code, out, error = qcft("ls", "--json")
    assert code == 0, error
    listed = {row["run"]: row for row in json.loads(out)}
    assert listed["tiny"]["state"] == "done"
    assert "newer qcft" in listed["newer"]["problem"]
    assert "no readable run.json" in listed["broken"]["problem"]
    assert "no readable ablation.json" in listed["bad"]["problem"]
    assert {row["state"] for name, row in listed.items() if name != "tiny"} == {"damaged"}
    assert qcft("ls")[0] == 0
    for command in (["show", "tiny"], ["report", "tiny"], ["export", "tiny", "--to", "out", "-q"], ["rm", "tiny"]):
        code, _, error = qcft(*command)
        assert code == 0, (command, error)
    assert not (place / "runs/tiny").exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["show", "newer"], "was written by a newer qcft"),
        (["show", "broken"], "there is no run 'broken'"),
        (["show", "bad"], "the ablation 'bad' has no readable ablation.json"),
        (["report", "bad"], "the ablation 'bad' has no readable ablation.json"),
        (["rm", "newer"], "was written by a newer qcft"),
        (["gc", "--delete"], "newer qcft|no readable run.json"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(place, qcft, command, says):
    broken_runs(place)
    code, out, error = qcft(*command)
    assert (code, out) == (2, "")
    assert any(part in error for part in says.split("|"))
    assert len(error.strip().splitlines()) == 2


@pytest.mark.parametrize(
    "text", ["{", '{"version": 1, "runs": 5}', '{"version": 1, "runs": [{"run": "a"}], "working": {}}']
)
def test_a_damaged_ablation_is_started_again(tmp_path, raw_recipe, text):
    plain = recipe_from(raw_recipe)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/ablation.json").write_text(text)
    with pytest.raises(InputError, match=r"no readable ablation\.json"):
        AblationIndex(tmp_path, "tiny").states()
    assert run_states(tmp_path)[0] == {}
    assert open_ablation(tmp_path, plain, [], {}).name == "tiny"
    assert AblationIndex(tmp_path, "tiny").states() == []


def test_a_damaged_done_json_is_listed(place, qcft):
    flip(folder_of(place, "phase2") / "done.json")
    code, out, error = qcft("ls", "--json")
    assert code == 0, error
    (row,) = json.loads(out)
    assert row["state"] == "damaged"
    assert "done.json is altered" in row["problem"]
