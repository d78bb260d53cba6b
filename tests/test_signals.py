"""Ctrl-C and SIGTERM in every part of a run: exit 130 or 143, a line that says how to resume, and it does."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from .helpers.runs import GENERATIVE, results

ROOT = Path(__file__).parents[1]
# The command, which sends itself the signals at the progress that is named; the second comes a moment later.
CODE = """
import os, signal, sys, threading
from qcft.terminal import progress
from qcft.cli import main
label, number, twice = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "twice"
sent = []
class Reporter(progress.Reporter):
    def __call__(self, event):
        if not sent and getattr(event, "label", "").startswith(label) and event.done:
            sent.append(event)
            os.kill(os.getpid(), number)
            if twice:
                os.kill(os.getpid(), number)
        super().__call__(event)
progress.Reporter = Reporter
sys.argv = ["qcft", *sys.argv[4:]]
main()
"""


@pytest.fixture
def recipe_file(raw_recipe, tmp_path):
    raw_recipe["phases"][1]["replay"] = GENERATIVE
    raw_recipe["phases"][0]["train"]["epochs"] = 6
    raw_recipe["merge"] = {"refuse_below": None}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw_recipe))
    return tmp_path / "recipe.yaml"


def signalled(recipe_file, label, number, times="once"):
    command = [sys.executable, "-c", CODE, label, str(int(number)), times, "run", str(recipe_file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, cwd=recipe_file.parent, capture_output=True, text=True, timeout=200)


def test_one_signal_after_the_other_and_the_result_is_the_same(recipe_file, tmp_path):
    """Training, merging, generating: each stopped once; the run is resumed in between."""
    from qcft import api
    from qcft.events import Watch
    from qcft.recipe import load_recipe

    for label, number, code in (
        ("training phase1", signal.SIGINT, 130),
        ("merging", signal.SIGTERM, 143),
        ("generating replay", signal.SIGINT, 130),
    ):
        done = signalled(recipe_file, label, number)
        assert done.returncode == code, done.stderr
        assert "stopping at the next safe point (again to stop at once)" in done.stderr
        last = done.stderr.strip().splitlines()[-2:]
        assert last[0].startswith("error: stopped"), last
        assert last[1].startswith("hint: the same command "), last
        assert ("a checkpoint was written" in last[0]) == label.startswith("training")
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
    api.run_watched(load_recipe(recipe_file), tmp_path / "runs", Watch())
    api.run_watched(load_recipe(recipe_file), tmp_path / "whole", Watch())
    assert results(tmp_path / "runs") == results(tmp_path / "whole")


def test_a_second_signal_stops_at_once(recipe_file):
    done = signalled(recipe_file, "training phase1", signal.SIGTERM, "twice")
    assert done.returncode == 143
    assert "error: stopped at once" in done.stderr
    assert "hint: the same command resumes" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_signal_before_any_work(recipe_file):
    """While the libraries are still being loaded."""
    code = "import sys; from qcft.cli import main; sys.argv[1:1] = ['run']; print('ready', flush=True); main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(recipe_file)], env=environment, cwd=recipe_file.parent, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "hint: the same command resumes" in err
    assert "Traceback" not in err


def test_a_closed_terminal_writes_a_checkpoint(recipe_file):
    """SIGHUP comes from the kernel and the shell both; writing to a closed terminal is an error, which ends nothing."""
    main_end, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, "training phase1", str(int(signal.SIGHUP)), "twice", "run", str(recipe_file)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=recipe_file.parent, stdin=terminal, stdout=terminal,
        stderr=terminal, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
    )  # fmt: skip
    os.close(terminal)
    shown = b""
    while b"train phase1" not in shown:
        shown += os.read(main_end, 4096)
    os.close(main_end)
    assert process.wait(timeout=200) == 129
    (step,) = (recipe_file.parent / "runs" / ".steps").glob("train-*")
    assert any((step / "checkpoints").glob("checkpoint-*"))
    assert signalled(recipe_file, "no such label", signal.SIGHUP).returncode == 0


def test_under_nohup_a_closed_terminal_stops_nothing(recipe_file):
    command = [sys.executable, "-c", CODE, "training phase1", str(int(signal.SIGHUP)), "once", "run", str(recipe_file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["nohup", *command], env=environment, cwd=recipe_file.parent, capture_output=True, timeout=200
    )
    assert done.returncode == 0
