"""Ablations whose processes are killed: what is done stays done, and the end is that of one left alone."""

import json
import os
import signal

import pytest
import yaml

import qcft
from qcft.store.ablations import AblationIndex

from .helpers.ablation_kills import (
    done_steps,
    kill_ablations,
    start,
    table,
    wait_for,
    working,
)
from .helpers.planted import check_unused, plant


@pytest.fixture
def recipe_file(raw_recipe, tmp_path):
    arms = [{"name": "plain", "set": {"phase2.replay": None}}, {"name": "er"}]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**raw_recipe, "ablation": {"arms": arms}}))
    return path


def test_a_killed_ablation_ends_like_an_uninterrupted_one(recipe_file, tmp_path):
    """Its process is begun again in a folder with modules of the libraries' names."""
    qcft.ablate(recipe_file, runs=tmp_path / "alone")
    plant(recipe_file.parent)
    kill_ablations(recipe_file, tmp_path / "killed", "tiny", times=2, span=8, seed=0)
    check_unused(recipe_file.parent)
    assert table(tmp_path / "killed", "tiny") == table(tmp_path / "alone", "tiny")


def test_an_arm_whose_process_is_killed_does_not_stop_the_others(recipe_file, tmp_path):
    runs = tmp_path / "runs"
    process = start(recipe_file, runs)
    wait_for(lambda: done_steps(runs), process)
    os.kill(working(runs, "tiny")["tiny-plain-s0"]["pid"], signal.SIGKILL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "tiny-plain-s0: its process crashed (SIGKILL); continuing with the other arms" in err
    states = {state.run: state for state in AblationIndex(runs, "tiny").states()}
    assert states["tiny-er-s0"].state == "done"
    assert states["tiny-plain-s0"].state == "failed"
    assert states["tiny-plain-s0"].error["message"] == "its process crashed (SIGKILL)"
    before = done_steps(runs)
    done = qcft.ablate(recipe_file, runs=runs)
    assert {state.state for state in done.states()} == {"done"}
    assert {path: then for path, then in done_steps(runs).items() if path in before} == before
    assert json.dumps(table(runs, "tiny"))


def test_an_arm_whose_process_exits_with_1_does_not_stop_the_others(recipe_file, tmp_path):
    """As bitsandbytes does when CUDA fails; here by a module that Python loads as it starts."""
    runs, places = tmp_path / "runs", tmp_path / "places"
    places.mkdir()
    (places / "sitecustomize.py").write_text(
        "import os, pathlib, sys, threading, time\n"
        f"runs, once = pathlib.Path({str(runs)!r}), pathlib.Path({str(tmp_path / 'once')!r})\n"
        "def end():\n"
        "    while not list(runs.glob('.steps/*/done.json')):\n"
        "        time.sleep(0.02)\n"
        "    once.touch()\n"
        "    os._exit(1)\n"
        "if '--supervised' in sys.orig_argv and not once.exists():\n"
        "    threading.Thread(target=end, daemon=True).start()\n"
    )
    process = start(recipe_file, runs, places)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "tiny-plain-s0: its process crashed (exit code 1); continuing with the other arms" in err
    states = {state.run: state for state in AblationIndex(runs, "tiny").states()}
    assert states["tiny-er-s0"].state == "done"
    assert states["tiny-plain-s0"].state == "failed"
