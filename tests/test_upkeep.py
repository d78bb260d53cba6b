"""Keeping the runs folder small: what no run uses is listed, removed when asked; a run is removed, its steps stay."""

import errno
import io
import json
import multiprocessing
import os
import shutil
import socket
import threading
import time

import pytest
import yaml

from qcft import InputError
from qcft.events import Watch
from qcft.files import read_json
from qcft.recipe import ArmRun, recipe_from
from qcft.store import Store, list_runs, open_run
from qcft.store.ablations import open_ablation
from qcft.store.holding import working
from qcft.store.upkeep import remove_run, remove_unused, unused_steps

from .helpers.bad_input import listing
from .helpers.tiny import make_recipe

RECIPE = recipe_from({"name": "r", "model": "m", "phases": [{"name": "phase1", "data": "a"}]})


def make(store, step, size=1000, **inputs):
    with store.claim(
        step, {"weights": None, "adapter": None, "settings": {}, "parents": [], **inputs}, Watch()
    ) as folder:
        (folder / "bytes").write_bytes(b"x" * size)
        store.finish(step, {}, 1.0)
    return step


@pytest.fixture
def store(tmp_path):
    """Two runs that share a phase 1, a pool behind one's replay, and steps of a run that is gone."""
    store = Store(tmp_path / "runs")
    for step in ("train-1", "train-3", "probe-9"):
        make(store, step)
    make(store, "pool-1")
    make(store, "merge-1", adapter="train-1")
    make(store, "replay-1", weights="merge-1", settings={"parts": [{"pool": "pool-1"}, {"pool": None}]})
    make(store, "train-2", weights="merge-1", parents=["replay-1"])
    make(store, "train-9", 5000)
    make(store, "prefix-1", 3000)
    open_run(store.runs, RECIPE, {"phase1": "train-1", "phase2": "train-2"})
    open_run(store.runs, RECIPE.model_copy(update={"name": "s"}), {"phase1": "train-1", "phase2": "train-3"})
    return store


def names(found):
    return [one.step for one in found]


def test_what_no_run_uses_and_how_large_it_is(store):
    found = unused_steps(store.runs)
    assert names(found) == ["train-9", "prefix-1", "probe-9"]  # the largest first
    assert 5000 < found[0].bytes < 7000
    assert found[0].what == "no run uses it"


def test_stored_states_are_used_while_a_training_is_to_come(store):
    (store.folder("train-3") / "done.json").unlink()
    assert names(unused_steps(store.runs)) == ["train-9", "probe-9"]


def test_nothing_is_removed_that_a_run_depends_on(store):
    removed, left = remove_unused(store.runs)
    assert (names(removed), left) == (["train-9", "prefix-1", "probe-9"], [])
    there = {p.name for p in store.steps.iterdir() if not p.name.startswith(".")}
    assert there == {"train-1", "train-2", "train-3", "merge-1", "replay-1", "pool-1"}
    assert unused_steps(store.runs) == []


def test_a_removed_run_leaves_its_steps_to_the_others(store):
    assert remove_run(store.runs, "r") == []
    assert [run.name for run in list_runs(store.runs)] == ["s"]
    assert not (store.runs / "r").exists()
    assert {"train-2", "merge-1", "replay-1", "pool-1"} < set(names(unused_steps(store.runs)))
    assert "train-1" not in names(unused_steps(store.runs))


def test_files_that_are_not_qcfts_are_left_and_named(store):
    (store.runs / "r" / "notes.txt").write_text("mine")
    assert remove_run(store.runs, "r") == ["notes.txt"]
    assert [p.name for p in (store.runs / "r").iterdir()] == ["notes.txt"]


def _hold(runs, step):
    with Store(runs).claim(step, {}, Watch()) as folder:
        (folder / "held").write_text("")
        time.sleep(60)


@pytest.fixture
def held(store):
    """A process works on a step: the function starts it."""
    started = []

    def start(step):
        process = multiprocessing.get_context("spawn").Process(target=_hold, args=(store.runs, step))
        process.start()
        started.append(process)
        while not (store.folder(step) / "held").exists():
            time.sleep(0.02)

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_step_that_is_worked_on_is_never_removed(store, held):
    held("train-9")
    removed, left = remove_unused(store.runs)
    assert names(left) == ["train-9"]
    assert names(removed) == ["prefix-1", "probe-9"]
    assert (store.folder("train-9") / "bytes").is_file()


def test_a_run_that_is_worked_on_is_not_removed(store, held):
    held("train-2")
    with pytest.raises(InputError, match=r"process \d+ on .* works on train-2 of the run 'r'"):
        remove_run(store.runs, "r")
    assert (store.runs / "r" / "run.json").is_file()


def _work_on(runs, name):
    with working(runs, name):
        (runs / "begun").write_text("")
        time.sleep(60)


def test_a_run_between_two_steps_of_a_live_process_is_not_removed(store, qcft):
    """Its name is held as long as a process works on it, whichever step; the system lets go of a killed one's."""
    process = multiprocessing.get_context("spawn").Process(target=_work_on, args=(store.runs, "r"))
    process.start()
    try:
        while not (store.runs / "begun").exists():
            time.sleep(0.02)
        with working(store.runs, "r"):  # several may
            pass
        listed = json.loads(qcft("ls", "--runs", store.runs, "--json")[1])
        assert {one["run"]: one["state"] for one in listed} == {"r": "running", "s": "done"}
        before = listing(store.runs / "r")
        code, out, err = qcft("rm", "r", "--runs", store.runs)
        assert (code, out) == (2, "")
        assert f"process {process.pid} on {socket.gethostname()} works on the run 'r'" in err
        assert listing(store.runs / "r") == before
    finally:
        process.kill()
        process.join()
    assert qcft("rm", "r", "--runs", store.runs)[0] == 0
    assert not (store.runs / "r").exists()
    with pytest.raises(InputError, match="the run 'r' was removed meanwhile"), working(store.runs, "r"):
        pass


def test_what_a_finishing_step_removes_is_not_missed(store):
    """Files that go while they are counted, and checkpoints that a step removes itself as it ends."""
    checkpoints = store.folder("train-1") / "checkpoints"
    stop, rounds, before = threading.Event(), [], set(names(unused_steps(store.runs)))

    def come_and_go():
        while not stop.is_set():
            for number in range(20):
                (checkpoints / f"checkpoint-{number}").mkdir(parents=True, exist_ok=True)
                (checkpoints / f"checkpoint-{number}" / "state").write_text("x")
            shutil.rmtree(checkpoints, ignore_errors=True)
            rounds.append(1)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(60):
            assert before <= set(names(unused_steps(store.runs))) <= before | {"train-1"}
    finally:
        stop.set()
        thread.join()
    assert rounds


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, color_data):
    """A run of one phase, and how often `rm` was refused while it ran."""
    from qcft import api

    runs = tmp_path_factory.mktemp("trained") / "runs"
    raw = make_recipe(tiny_model, color_data)
    raw["phases"] = raw["phases"][:1]
    refused = []

    def remove(event):
        if (runs / "tiny" / "run.json").exists():
            with pytest.raises(InputError, match="works on the run 'tiny'"):
                remove_run(runs, "tiny")
            refused.append(event)

    api.run_watched(recipe_from(raw), runs, Watch(remove))
    return runs, refused


def test_a_run_is_held_at_every_event_of_its_work(trained):
    runs, refused = trained
    assert len(refused) > 8
    assert [run.name for run in list_runs(runs)] == ["tiny"]
    assert not [*(runs / "tiny").glob(".working-*")]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("command", [["rm", "tiny"], ["gc", "--delete"], ["report", "tiny"]])
def test_a_folder_that_cannot_be_written_is_reported_in_one_line(trained, qcft, monkeypatch, command, code):
    """Permission bits mean nothing to root: the system's own calls refuse to write."""
    runs, _ = trained
    qcft("show", "tiny", "--runs", runs)  # libraries write what they compile

    def refusing(real, writes):
        def call(path, *more, **named):
            if str(path).startswith(str(runs)) and writes(*more):
                raise OSError(code, os.strerror(code), os.fspath(path))
            return real(path, *more, **named)

        return call

    before = listing(runs)
    monkeypatch.setattr(io, "open", refusing(io.open, lambda mode="r", *_, **__: not mode.startswith("r")))
    monkeypatch.setattr(os, "open", refusing(os.open, lambda flags, *_: flags & (os.O_CREAT | os.O_RDWR)))
    for name in ("mkdir", "unlink", "rename"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name), lambda *_: True))
    ended, out, err = qcft(*command, "--runs", runs)
    monkeypatch.undo()
    assert (ended, out) == (2, ""), err
    assert "cannot be written" in err
    assert len(err.strip().splitlines()) == 2
    assert listing(runs) == before


def test_checkpoints_of_a_finished_training_are_unused(store):
    (store.folder("train-1") / "checkpoints" / "checkpoint-3").mkdir(parents=True)
    assert ("train-1", "checkpoints") in [(one.step, one.part) for one in unused_steps(store.runs)]
    remove_unused(store.runs)
    assert not (store.folder("train-1") / "checkpoints").exists()
    assert Store(store.runs).done("train-1") is not None


@pytest.mark.parametrize("text", ["{", '{"stages": {"phase1": 5}}', '{"stages": {"phase1": "../../elsewhere"}}'])
def test_with_a_run_that_cannot_be_read_nothing_is_removed(store, text):
    (store.runs / "r" / "recipe.yaml").unlink()
    (store.runs / "r" / "run.json").write_text(text)
    with pytest.raises(InputError, match="the steps it uses are unknown"):
        remove_unused(store.runs)
    with pytest.raises(InputError, match="there is no run 'r'"):
        remove_run(store.runs, "r")
    assert (store.folder("train-9") / "bytes").is_file()


def test_the_commands_are_dry_by_default(store, qcft):
    code, out, err = qcft("gc", "--runs", store.runs)
    assert code == 0
    assert "train-9" in out
    assert "3 unused steps" in err
    assert "--delete" in err
    assert store.folder("train-9").exists()
    output = json.loads(qcft("gc", "--runs", store.runs, "--json")[1])
    assert [one["step"] for one in output["unused"]] == ["train-9", "prefix-1", "probe-9"]
    assert not output["deleted"]
    code, out, err = qcft("gc", "--delete", "--runs", store.runs)
    assert (code, store.folder("train-9").exists()) == (0, False)
    assert "3 unused steps removed" in err
    code, _, err = qcft("rm", "r", "--runs", store.runs)
    assert code == 0
    assert "Removed 'r'." in err
    assert "qcft gc" in err
    assert qcft("gc", "--runs", "nowhere")[0] == 0


def test_several_runs_are_removed_or_none(store, qcft):
    code, _, err = qcft("rm", "r", "nope", "--runs", store.runs)
    assert code == 2
    assert "there is no run 'nope'" in err
    assert len(list_runs(store.runs)) == 2
    code, _, err = qcft("rm", "r", "s", "r", "--runs", store.runs)
    assert code == 0, err
    assert "Removed 'r', 's'." in err
    assert f"next: qcft gc --delete --runs {store.runs}" in " ".join(err.split())
    assert list_runs(store.runs) == []


@pytest.fixture
def ablations(store):
    """Two ablations; an arm of the first is an arm of the second too."""
    arm = ArmRun("plain", 0, RECIPE, {})
    made = open_ablation(store.runs, RECIPE.model_copy(update={"name": "a"}), [arm], {("plain", 0): "r"})
    both = {("plain", 0): "r", ("other", 0): "s"}
    open_ablation(store.runs, RECIPE.model_copy(update={"name": "b"}), [arm, ArmRun("other", 0, RECIPE, {})], both)
    (made.folder / "report").mkdir()
    (made.folder / "report" / "report.html").write_text("")
    return store


def test_an_ablation_is_removed_with_its_runs_once_confirmed(ablations, qcft):
    """But for those of another ablation."""
    runs = ablations.runs
    before = listing(runs)
    code, _, err = qcft("rm", "b", "--runs", runs)
    assert code == 2
    assert "also removes the 1 run of its arms: s" in err
    assert "qcft rm b --yes" in err
    assert listing(runs) == before
    listed = {one["run"]: one for one in json.loads(qcft("ls", "--runs", runs, "--json")[1])}
    assert [listed[name]["kind"] for name in ("a", "b", "r", "s")] == ["ablation", "ablation", "run", "run"]
    assert (listed["b"]["done"], listed["b"]["runs"], listed["s"]["ablation"]) == (2, 2, "b")
    assert "2 of 2 runs" in qcft("ls", "--runs", runs)[1]
    code, _, err = qcft("rm", "b", "--yes", "--runs", runs)
    assert code == 0, err
    assert "Removed 's', 'b'." in err
    assert sorted(p.name for p in runs.iterdir() if not p.name.startswith(".")) == ["a", "r"]
    assert qcft("rm", "a", "-y", "--runs", runs)[0] == 0  # what shared its run is gone by now
    assert [p for p in runs.iterdir() if not p.name.startswith(".")] == []


def test_a_step_removed_while_a_run_begins_is_made_again(raw_recipe, tmp_path):
    """Between looking at the steps and naming the run, another process may have removed what no run used."""
    from qcft import api
    from qcft.events import Note

    raw_recipe["phases"] = raw_recipe["phases"][:1]
    api.run_watched(recipe_from(raw_recipe), tmp_path, Watch())
    shutil.rmtree(tmp_path / "tiny")

    def remove(event):
        if isinstance(event, Note) and "4 reused" in event.text:
            assert len(remove_unused(tmp_path)[0]) == 4

    done = api.run_watched(recipe_from(raw_recipe), tmp_path, Watch(remove))
    assert len(done.stages) == 4
    assert read_json(tmp_path / "tiny" / "run.json")["stages"].keys() == done.stages.keys()
    assert yaml.safe_load((tmp_path / "tiny" / "recipe.yaml").read_text())["name"] == "tiny"
