"""Ablations that are killed at random."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from qcft import api
from qcft.files import read_json
from qcft.store.ablations import AblationIndex

ROOT = Path(__file__).parents[2]


def start(recipe: Path, runs: Path, *places: Path) -> subprocess.Popen:
    """`qcft ablate` in a group of its own, so that all its processes can be killed at once."""
    command = [sys.executable, "-m", "qcft", "ablate", str(recipe), "--runs", str(runs), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*places, ROOT)))}
    return subprocess.Popen(
        command, env=environment, cwd=recipe.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def working(runs: Path, name: str) -> dict:
    return (read_json(runs / name / "ablation.json") or {}).get("working", {})


def workers(runs: Path, name: str) -> set[int]:
    return {process["pid"] for process in working(runs, name).values()}


def done_steps(runs: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (runs / ".steps").glob("*/done.json")}


def table(runs: Path, name: str) -> dict:
    """All that was measured and trained, less seconds and peaks of memory."""
    outcome = api.ablation_outcome(AblationIndex(runs, name))
    return {
        "arms": [_equal_parts(arm) for arm in outcome["arms"]],
        "runs": {run["run"]: _equal_parts(api.read(run["run"], runs).table) for run in outcome["runs"]},
    }


def _equal_parts(node):
    if isinstance(node, dict):
        apart = ("seconds", "peak_")
        return {key: _equal_parts(value) for key, value in node.items() if not key.startswith(apart)}
    return [_equal_parts(one) for one in node] if isinstance(node, list) else node


def kill_ablations(recipe: Path, runs: Path, name: str, times: int, span: float, seed: int) -> list[int]:
    """Kill an ablation `times` times, each within `span` seconds of its work's begin, then let it end.

    Returns how many steps were done at each kill. Asserts that no done step was done again.
    """
    moments = random.Random(seed)
    found = []
    before: dict[Path, int] = {}
    dead: set[int] = set()
    for _ in range(times):
        process = start(recipe, runs)
        wait_for(lambda: workers(runs, name) - dead, process)  # those that were killed are still in the index
        dead.update(workers(runs, name))
        time.sleep(moments.uniform(0, span))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        done = done_steps(runs)
        assert {path: done[path] for path in before} == before
        before = done
        found.append(len(done))
    process = start(recipe, runs)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    done = done_steps(runs)
    assert {path: done[path] for path in before} == before
    return found
