"""The command line: what it prints where, exit codes, and every mistake as two lines with nothing written."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture
def recipe_file(raw_recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw_recipe))
    return path


def two_lines(err):
    lines = [line for line in err.strip().splitlines() if not line.startswith("tiny: ")]  # what is about to be done
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("hint: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--set", "phase2.train.lrr=1"], "unknown key 'phase2.train.lrr'"),
        (["--set", "phase2.train.lr=fast"], "phase2.train.lr: 'fast'"),
        (["--set", "phase2.replay.ratio=0.95"], "outside [0, 0.9]"),
        (["--set", "phase3.freeze=none"], "no phase or recipe key 'phase3'"),
        (["--set", "nothing=1"], "no phase or recipe key 'nothing'"),
        (["--set", "seed"], "not KEY=VALUE"),
        (["--set", "phase2.data=[{path: nope.jsonl}]"], "no file 'nope.jsonl'"),
        (["--set", "phase2.data=[{path: empty.jsonl}]"], "is empty"),
        (["--set", "phase2.data=[{path: odd.jsonl}]"], "no known format"),
        (["--set", "phase2.data=[]"], "has no data"),
        (["--set", "phase2.data.0.format=alpacca"], "alpacca"),
        (["--set", "model.name=smollm2-135m-instuct"], "not an embedded model"),
        (["--set", "model.name=plain"], "holds no model"),
        (["--set", "model.name=cut.gguf"], "is not a GGUF file"),
        (["--set", "model.name=someone/something"], "in the local cache"),
        (["--set", "phase2.data=[{path: someone/something}]"], "in the local cache"),
        (["--set", "model.name=untemplated"], "no chat template"),
        (["--set", "phase2.freeze=first:3"], "freezes all 3 layers"),
        (["--set", "phase2.freeze=layers:7"], "names layer 7"),
        (["--set", "lora.targets=[q_porj]"], "no linear module 'q_porj'"),
        (["--set", "phase2.train.max_length=8"], "none of the"),
        (["--set", "model.attn_implementation=flash_attention_9"], "flash_attention_9"),
        (["--set", "phase2.train.scheduler=cosin"], "no scheduler 'cosin'"),
        (["--set", "phase1={adapter: nowhere}"], "no folder 'nowhere'"),
        (["--as", "a/b"], "cannot name a run"),
        (["--runs", "empty.jsonl/runs"], "is a file"),
    ],
)
def test_a_mistake_is_two_lines_exit_2_and_nothing_written(qcft, recipe_file, tiny_model, tmp_path, arguments, says):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "odd.jsonl").write_text('{"foo": 1}\n')
    (tmp_path / "plain").mkdir()
    (tmp_path / "cut.gguf").write_bytes(b"GG")
    untemplated = shutil.copytree(tiny_model, tmp_path / "untemplated")
    (untemplated / "chat_template.jinja").unlink()
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    code, out, err = qcft("run", str(recipe_file), *arguments)
    assert code == 2
    assert says in two_lines(err)
    assert out == ""
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_a_runs_folder_that_cannot_be_written(qcft, recipe_file, tmp_path):
    """A folder without permission; for root, who may write anywhere, one that takes no folders."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    code, _, err = qcft("run", str(recipe_file), "--runs", "/proc/runs" if os.geteuid() == 0 else "locked/runs")
    assert code == 2
    assert "cannot be written" in err
    assert err.strip().splitlines()[-1].startswith("hint: ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nope"], "nope"),
        (["run"], "recipe"),
        (["run", "x", "--replya"], "--replya"),
        (["phase2", "x", "--replay", "much"], "--replay"),
    ],
)
def test_mistakes_on_the_command_line_look_the_same(qcft, arguments, says):
    code, out, err = qcft(*arguments)
    assert code == 2
    assert says in two_lines(err).lower()
    assert out == ""


def test_version_and_help(qcft):
    from qcft import __version__

    assert qcft("--version") == (0, f"qcft {__version__}\n", "")
    assert "phase2" in qcft("--help")[1]
    assert "phase2" in qcft()[1]
    assert "--freeze" in qcft("phase2", "--help")[1]


def test_no_traceback_without_debug(qcft, recipe_file, monkeypatch):
    """Neither for a mistake nor for what nobody thought of; with --debug both are raised."""
    from qcft import InputError, api

    arguments = ["run", str(recipe_file), "--set", "seed=x"]
    assert "Traceback" not in qcft(*arguments)[2]
    with pytest.raises(InputError):
        qcft(*arguments, "--debug")
    monkeypatch.setattr(api, "run_watched", lambda *_: 1 / 0)
    code, _, err = qcft("run", str(recipe_file))
    assert code == 1
    assert "ZeroDivisionError" in two_lines(err)
    with pytest.raises(ZeroDivisionError):
        qcft("run", str(recipe_file), "--debug")


@pytest.mark.parametrize(
    ("ends", "code", "says"),
    [
        ("", 0, "mod\\xe8le"),  # a terminal that has no such letter
        (">&-", 0, ""),
        (">/dev/full", 1, "error: the disk that is written to is full\nhint: free some space"),
        ("--runs ../x; rmdir ../gone; python -m qcft ls", 2, "error: the current folder was deleted\nhint: "),
    ],
    ids=["ASCII", "closed", "full", "no folder"],
)
def test_odd_places_to_write_to(raw_recipe, tmp_path, ends, code, says):
    run = tmp_path / "gone" / "runs" / "x" if not ends.startswith("--") else tmp_path / "x" / "x"
    (tmp_path / "gone").mkdir()
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"stages": {}}')
    (run / "recipe.yaml").write_text(yaml.safe_dump({**raw_recipe, "model": "modèle"}))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PATH": path}
    done = subprocess.run(
        ["bash", "-c", f"python -m qcft ls {ends}"], cwd=tmp_path / "gone", env=environment, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert "unexpected" not in done.stderr


def test_dry_run_lists_the_steps_and_does_nothing(qcft, recipe_file, tmp_path):
    code, out, _ = qcft("run", str(recipe_file), "--dry-run")
    assert code == 0
    assert out.count("to do") == 10
    assert not (tmp_path / "runs").exists()
    _, out, _ = qcft("run", str(recipe_file), "--dry-run", "--json")
    assert [s["stage"] for s in json.loads(out)][:3] == ["eval/base-16bit", "eval/base", "phase1"]


@pytest.mark.parametrize(
    ("setting", "says"),
    [("phase1.train.scheduler=cosin", "no scheduler 'cosin'"), ("phase1.freeze=first:3", "freezes all 3 layers")],
)
def test_dry_run_finds_what_the_real_call_refuses(qcft, tiny_model, color_data, tmp_path, setting, says):
    command = ["phase1", "x", "-m", tiny_model, "-d", color_data / "en.jsonl", "--set", setting]
    printed = []
    for more in ([], ["--dry-run"]):
        code, out, err = qcft(*command, *more)
        assert (code, out) == (2, "")
        printed.append([line for line in err.splitlines() if line.startswith(("error", "hint"))])
    assert printed[0] == printed[1]
    assert says in printed[0][0]
    assert not (tmp_path / "runs").exists()


def test_run_then_show_ls_and_phase2(qcft, recipe_file, tmp_path):
    code, out, err = qcft("run", str(recipe_file), "--json")
    assert code == 0, err
    table = json.loads(out)
    assert table["run"] == "tiny"
    assert "[3/10] train phase1" in err
    assert "phase2: " in err
    assert "replay (english)" in err
    code, out, _ = qcft("show", "--json")
    assert json.loads(out)["stages"] == table["stages"]
    code, out, _ = qcft("show", "tiny")
    assert "phase2 since phase1" in out
    assert "phase1 en *" in out
    assert re.search("English (got|did not get) worse|whether English got worse", out)
    _, out, _ = qcft("ls", "--json")
    (listed,) = json.loads(out)
    english = next(g["name"] for g in table["groups"] if g["english"])
    assert listed.pop("english") == table["changes"][0]["groups"][english]
    assert listed.pop("made").startswith("20")
    assert listed | {"model": ""} == {
        "run": "tiny",
        "kind": "run",
        "model": "",
        "phases": ["phase1", "phase2"],
        "data": {"phase1": ["en"], "phase2": ["es", "pt"]},
        "replay": 0.2,
        "freeze": "first:1",
        "steps": 10,
        "done": 10,
        "state": "done",
        "ablation": None,
        "runs": None,
        "problem": None,
    }
    assert qcft("ls")[1].splitlines()[1].split()[:5] == ["tiny", "done", "10", "of", "10"]
    # The latest run with a phase 1, its own data, another ratio: a new run that shares what it can.
    code, out, err = qcft("phase2", "--replay", "0.1", "--freeze", "last:1", "--json")
    assert code == 0, err
    assert json.loads(out)["run"] == "tiny-2"
    assert "7 steps reused" in err
    recipe = yaml.safe_load((tmp_path / "runs" / "tiny-2" / "recipe.yaml").read_text())
    assert recipe["phases"][1]["replay"]["ratio"] == 0.1
    assert recipe["phases"][1]["freeze"] == "last:1"


def test_phase1_then_phase2_from_flags(qcft, tiny_model, color_data, tmp_path):
    small = ["--set", "lora.r=4", "--set", "heldout={share: 0.2, rows: 4}", "--set", "answers.prompts=0"]
    short = ["--set", "phase1.train={batch: 4, max_length: 64}"]
    code, _, err = qcft(
        "phase1",
        "mine",
        "--model",
        str(tiny_model),
        "--data",
        str(color_data / "en.jsonl"),
        "--take",
        "12",
        *small,
        *short,
    )
    assert code == 0, err
    code, _, err = qcft("phase2", "mine")
    assert code == 2
    assert "phase2 has no data" in two_lines(err)
    short = ["--set", "phase2.train={batch: 4, max_length: 64}", "--set", "phase2.replay.kind=english"]
    short += ["--set", f"phase2.replay.data={color_data / 'en.jsonl'}"]
    code, out, err = qcft(
        *("phase2", "mine", "--data", f"es={color_data / 'es.jsonl'}", "--take", "12", "--replay", "0.2", *short),
        *("--anchor", "kl:0.5", "--replay-loss", "distil"),
    )
    assert code == 0, err
    assert "phase2 es" in out
    assert "anchor kl:0.5, replay distilled" in " ".join(err.split())
    assert re.search(r"loss \d\.\d+ \(new rows \d\.\d+, anchor KL 0\.\d+, distilled replay KL 0\.\d+\)", err), err
    page = (tmp_path / "runs" / "mine" / "report" / "report.md").read_text()
    assert "loss of new rows" in page
    assert "distilled KL" in page
    shown = qcft("show", "mine")[1]
    assert re.search(
        r"phase2, terms of the training loss in nats per answer token: new rows .*, anchor KL .*, distilled replay KL",
        shown,
    )
    assert json.loads((tmp_path / "runs" / "mine" / "run.json").read_text())["stages"]["phase2"]


def test_phase2_with_a_model_can_be_repeated(qcft, tiny_model, color_data, tmp_path):
    """What an interrupted command's hint says: the same command resumes, also with the relative path of a model."""
    (tmp_path / "model").symlink_to(tiny_model)
    command = ["phase2", "inst", "--model", "model", "--data", f"es={color_data / 'es.jsonl'}", "--take", "12"]
    command += ["--set", "phase2.train={batch: 4, max_length: 64}", "--set", "heldout.share=0.2"]
    for state in ("train phase2\n", "4 steps reused"):
        code, _, err = qcft(*command, "--set", "answers.prompts=0")
        assert code == 0, err
        assert state in err
    assert [p.name for p in (tmp_path / "runs").glob("*/run.json")] == ["run.json"]
    code, _, err = qcft(*command[:3], "other", *command[4:])
    assert code == 2
    assert "has another model" in two_lines(err)
    code, _, err = qcft("check", "quickstart", "--freeze", "snr:0.5")
    assert code == 2
    assert "'quickstart' is a recipe" in two_lines(err)


def test_phase2_on_an_instruct_model(qcft, tiny_model, color_data):
    code, out, err = qcft(
        "phase2", "inst", "--model", str(tiny_model), "--data", f"es={color_data / 'es.jsonl'}", "--dry-run"
    )
    assert code == 0, err
    assert "train phase2" in out
    assert "merge" not in out


def test_a_table_too_wide_for_the_terminal_comes_in_blocks():
    from qcft.terminal.tables import columns_that_fit

    titles, rows = ["stage", *(f"phase2 {i}" for i in range(9))], [["x" * 20, *["1.234  50%"] * 9]]
    assert columns_that_fit(titles, rows, 200) == [list(range(10))]
    narrow = columns_that_fit(titles, rows, 60)
    assert [i for block in narrow for i in block[1:]] == list(range(1, 10))
    assert all(block[0] == 0 and 22 + 12 * (len(block) - 1) <= 60 for block in narrow)
    assert columns_that_fit(titles, rows, 5) == [[0, i] for i in range(1, 10)]


def test_libraries_print_nothing_when_they_are_imported():
    """On CPUs with 16-bit products bitsandbytes names a kernel that it does without."""
    code = "from qcft.runner.libraries import set_environment; set_environment(); import bitsandbytes"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_what_bitsandbytes_reports_when_it_is_imported_is_not_shown(tmp_path):
    """Whichever command loads it first: its level is set before any command begins."""
    code = (
        "import logging, sys\nfrom qcft.cli import main\nsys.argv = ['qcft', 'ls']\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "logging.getLogger('bitsandbytes.backends.cpu.ops').warning('Failed to load')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert "no runs" in done.stdout + done.stderr
    assert "Failed" not in done.stderr


def test_recipes(qcft):
    code, out, _ = qcft("recipes")
    assert code == 0
    assert "quickstart" in out
    _, out, _ = qcft("recipes", "--show", "quickstart")
    assert yaml.safe_load(out)["name"] == "quickstart"
    code, _, err = qcft("recipes", "--show", "quikstart")
    assert code == 2
    assert "did you mean 'quickstart'" in err


def test_nothing_to_show(qcft):
    for command in (
        ["show"],
        ["show", "x"],
        ["phase2"],
        ["phase1", "x", "--data", "y"],
        ["phase1", "x", "--model", "m"],
    ):
        code, _, err = qcft(*command)
        assert code == 2
        two_lines(err)
    code, out, _ = qcft("ls", "--json")
    assert (code, json.loads(out)) == (0, [])


def test_sigterm_stops_with_a_checkpoint_and_exit_143_and_the_run_resumes(recipe_file, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [
        sys.executable,
        "-m",
        "qcft",
        "run",
        str(recipe_file),
        "--set",
        "phase1.train={lr: 0.01, batch: 2, max_length: 64, epochs: 40}",
    ]
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/.steps/train-*/log.jsonl")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "a checkpoint was written" in err
    assert "hint: the same command resumes from it" in err
    assert "Traceback" not in err
    assert list(tmp_path.glob("runs/.steps/train-*/checkpoints/checkpoint-*/files.sha256"))
