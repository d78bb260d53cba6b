"""An ablation's steps on a local Ray of two workers, one of them killed on the way: the same results."""

import os
import signal
import threading
import time

import pytest
import yaml

import qcft
from qcft import api
from qcft.events import ArmChanged, Watch
from qcft.files import read_json
from qcft.recipe import load_ablation

from .helpers.ablation_kills import table
from .helpers.planted import check_unused, plant

pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def recipe_file(raw_recipe, tmp_path):
    arms = [
        {"name": "plain", "set": {"phase2.replay": None}},
        {"name": "er"},
        {"name": "wild", "set": {"phase2.replay": None, "phase2.train.lr": 1e30}},
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**raw_recipe, "ablation": {"arms": arms}}))
    return path


def kill_a_training(runs, killed, ended):
    """Kill the first worker that trains."""
    while not ended.is_set():
        for holder in (runs / ".steps").glob(".train-*.holder"):
            who = read_json(holder)
            if who and who["pid"] != os.getpid():
                os.kill(who["pid"], signal.SIGKILL)
                killed.append(holder.name.removeprefix(".").removesuffix(".holder"))
                return
        time.sleep(0.05)


def test_on_ray_with_a_worker_killed(recipe_file, tmp_path, monkeypatch):
    (tmp_path / "working").mkdir()
    monkeypatch.chdir(plant(tmp_path / "working"))
    runs, killed, events = tmp_path / "ray", [], []
    ended = threading.Event()
    killer = threading.Thread(target=kill_a_training, args=(runs, killed, ended), daemon=True)
    killer.start()
    plain, arms = load_ablation(recipe_file)
    done = api.ablate_watched(plain, arms, runs, Watch(events.append), on="ray")
    ended.set()
    killer.join()
    check_unused(tmp_path / "working")
    assert killed, "no worker was killed"
    assert (runs / ".steps" / killed[0] / "done.json").is_file(), "the step of the killed worker was run again"
    states = {state.arm: state for state in done.states()}
    assert {arm: state.state for arm, state in states.items()} == {"plain": "done", "er": "done", "wild": "failed"}
    assert "the loss is" in states["wild"].error["message"]
    assert states["wild"].error["title"] == "train phase2"
    assert [e.state for e in events if isinstance(e, ArmChanged) and e.arm == "er"][-1] == "done"
    qcft.ablate(recipe_file, runs=tmp_path / "alone", arms=["plain", "er"])
    here, there = table(runs, "tiny"), table(tmp_path / "alone", "tiny")
    assert here["arms"][:2] == there["arms"]
    assert all(here["runs"][name] == there["runs"][name] for name in there["runs"])


def test_an_engine_that_is_not_known_or_not_there(qcft, recipe_file, tmp_path):
    for engine, says in (("slurm", "neither ray nor ray:ADDRESS"), ("ray:127.0.0.1:1", "no cluster at '127.0.0.1:1'")):
        code, out, err = qcft("ablate", recipe_file, "--on", engine)
        assert code == 2
        assert says in err
        assert out == ""
        assert not (tmp_path / "runs").exists()
