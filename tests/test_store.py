"""Steps are done or not, complete or rebuilt, held by one process; runs never replace a result."""

import multiprocessing
import time

import pytest

from qcft import InputError
from qcft.events import Note, Watch
from qcft.recipe import recipe_from
from qcft.store import Store, list_runs, open_run, read_run
from qcft.store.runs import link_stage
from qcft.store.steps import writable

RECIPE = recipe_from({"name": "r", "model": "m", "phases": [{"name": "phase1", "data": "a"}]})


def make(store, step="train-1", text="hello"):
    with store.claim(step, {"a": 1}, Watch()) as folder:
        (folder / "adapter").write_text(text)
        return store.finish(step, {"loss": 1.0}, 2.0)


def test_a_step_is_to_do_then_partial_then_done(tmp_path):
    store = Store(tmp_path / "runs")
    assert store.state("train-1") == "to do"
    with store.claim("train-1", {"a": 1}, Watch()) as folder:
        assert store.state("train-1") == "partial"
        assert (folder / "step.json").is_file()
    assert store.done("train-1") is None
    record = make(store)
    assert store.state("train-1") == "done"
    assert Store(tmp_path / "runs").done("train-1") == record


@pytest.mark.parametrize("damage", [b"hellO", b"hell", None])
def test_a_damaged_step_is_named_and_not_used(tmp_path, damage):
    make(Store(tmp_path))
    file = tmp_path / ".steps" / "train-1" / "adapter"
    file.unlink() if damage is None else file.write_bytes(damage)
    events = []
    assert Store(tmp_path).done("train-1", Watch(events.append)) is None
    assert "adapter is missing or altered" in events[0].text
    assert Store(tmp_path).done("train-1") is None
    again = Store(tmp_path)
    with again.claim("train-1", {}, Watch()) as folder:
        assert not (folder / "adapter").exists()


def test_a_truncated_done_json_is_not_done(tmp_path):
    make(Store(tmp_path))
    (tmp_path / ".steps" / "train-1" / "done.json").write_text('{"step": "train-1", "met')
    assert Store(tmp_path).done("train-1") is None


def _hold(runs, seconds):
    with Store(runs).claim("train-1", {}, Watch()) as folder:
        (folder / "held").write_text("x")
        time.sleep(seconds)


def test_a_second_process_waits_and_says_for_whom(tmp_path):
    context = multiprocessing.get_context("spawn")
    holder = context.Process(target=_hold, args=(tmp_path, 3))
    holder.start()
    while not (tmp_path / ".steps" / "train-1" / "held").exists():
        time.sleep(0.02)
    events: list[Note] = []
    begun = time.monotonic()
    with Store(tmp_path).claim("train-1", {}, Watch(events.append)):
        assert time.monotonic() - begun > 0.5
    assert f"process {holder.pid}" in events[0].text
    holder.join()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    context = multiprocessing.get_context("spawn")
    holder = context.Process(target=_hold, args=(tmp_path, 60))
    holder.start()
    while not (tmp_path / ".steps" / "train-1" / "held").exists():
        time.sleep(0.02)
    holder.kill()
    holder.join()
    with Store(tmp_path).claim("train-1", {}, Watch()):
        pass


def test_other_results_get_another_name_and_equal_ones_extend_the_run(tmp_path):
    first = open_run(tmp_path, RECIPE, {"phase1": "train-1", "eval/base": "probe-1"})
    assert first.name == "r"
    assert open_run(tmp_path, RECIPE, {"phase1": "train-1", "phase2": "train-2", "eval/base": "probe-2"}).name == "r"
    assert open_run(tmp_path, RECIPE, {"phase1": "train-1", "phase2": "train-3"}).name == "r-2"
    assert open_run(tmp_path, RECIPE, {"phase1": "train-1", "phase2": "train-3"}).name == "r-2"
    # A plan that holds less than the run leaves the run as it is.
    assert open_run(tmp_path, RECIPE, {"phase1": "train-1"}).name == "r"
    assert read_run(tmp_path, "r").stages["phase2"] == "train-2"
    assert open_run(tmp_path, RECIPE, {"phase1": "train-9"}).name == "r-3"


def test_a_folder_that_is_not_a_run_is_not_used(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine").write_text("x")
    assert open_run(tmp_path, RECIPE, {"phase1": "train-1"}).name == "r-2"


def test_links_survive_a_moved_runs_folder(tmp_path):
    store = Store(tmp_path / "runs")
    make(store)
    run = open_run(tmp_path / "runs", RECIPE, {"phase1": "train-1", "eval/base": "train-1"})
    for stage in run.stages:
        link_stage(run, stage, store.folder("train-1"))
    (tmp_path / "runs").rename(tmp_path / "moved ñ folder")
    for stage in run.stages:
        assert (tmp_path / "moved ñ folder" / "r" / stage / "adapter").read_text() == "hello"


def test_reading_runs(tmp_path):
    with pytest.raises(InputError, match="no run in"):
        read_run(tmp_path, None)
    open_run(tmp_path, RECIPE, {"phase1": "train-1"})
    with pytest.raises(InputError, match="no run 'q'"):
        read_run(tmp_path, "q")
    assert [run.name for run in list_runs(tmp_path)] == ["r"]
    assert read_run(tmp_path, None).recipe().name == "r"


def test_a_runs_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        writable(tmp_path / "file" / "runs")
    writable(tmp_path / "new" / "runs")
    assert not (tmp_path / "new").exists()
