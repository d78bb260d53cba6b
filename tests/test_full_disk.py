"""A disk that is really full (a small tmpfs in namespaces of its own), in every kind of step: one clear line, nothing
marked done, and once there is room the run resumes to the result it would have had."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

import qcft
from qcft import api
from qcft.events import StepBegun, StepEnded, Watch
from qcft.files import read_json
from qcft.recipe import load_recipe

from .helpers.namespaces import skip_without_namespaces
from .helpers.runs import GENERATIVE, results

ROOT = Path(__file__).parents[1]
STEPS = (*range(1, 11), "report")
# The disk is filled as a step begins, but for so many bytes: none, or enough to begin a file and not to end it.
MOMENTS = [(0, step) for step in STEPS] + [(30_000, 3), (90_000, 3), (90_000, 5)]


def fill(ballast, left):
    with ballast.open("wb", buffering=0) as stream:
        try:
            while stream.write(b"\0" * 4096):
                pass
        except OSError:
            pass
    if left:
        os.truncate(ballast, max(0, ballast.stat().st_size - left))


def go_through(recipe_file, runs):
    """Run in `runs` with the disk filled as each step begins and as the last has ended; the errors are printed."""
    ballast, errors = runs.parent / "ballast", []
    for left, wanted in MOMENTS:
        if left:
            shutil.rmtree(runs / ".steps")

        def listen(event, left=left, wanted=wanted):
            ended = isinstance(event, StepEnded) and wanted == "report" and event.title == "measure phase2"
            if ended or (isinstance(event, StepBegun) and event.position == wanted and event.state != "reused"):
                fill(ballast, left)

        try:
            api.run_watched(load_recipe(recipe_file), runs, Watch(listen))
        except qcft.QcftError as error:
            done = [p.parent.name for p in runs.glob(".steps/*/done.json")]
            whole = all(read_json(runs / ".steps" / step / "done.json") for step in done)
            litter = [str(p) for p in runs.rglob(".*.partial")]
            errors.append([left, wanted, error.message, error.hint, error.exit_code, len(done), whole, litter])
        finally:
            ballast.unlink(missing_ok=True)
    api.run_watched(load_recipe(recipe_file), runs, Watch())
    print(json.dumps({"errors": errors, "results": results(runs)}))


def test_every_step_meets_a_full_disk(raw_recipe, tmp_path):
    raw_recipe["phases"][1]["replay"] = GENERATIVE
    raw_recipe["phases"][0]["train"]["epochs"] = 6
    raw_recipe["merge"] = {"refuse_below": None}
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(raw_recipe))
    small = tmp_path / "small"
    small.mkdir()
    code = (
        "import sys; from pathlib import Path; from tests.test_full_disk import go_through\n"
        "go_through(Path(sys.argv[1]), Path(sys.argv[2]) / 'runs')"
    )
    script = f'mount -t tmpfs -o size=3m tmpfs "{small}" && exec "{sys.executable}" -c "$1" "{recipe_file}" "{small}"'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    skip_without_namespaces()
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    for left, wanted, message, hint, exit_code, finished, whole, litter in said["errors"]:
        assert message == f"the disk that holds '{small / 'runs'}' is full", (left, wanted)
        assert "qcft gc" in hint
        assert "resumes where it stopped" in hint
        assert exit_code == 1
        assert finished == STEPS.index(wanted)
        assert whole
        assert not litter
    assert [(left, wanted) for left, wanted, *_ in said["errors"]] == MOMENTS
    api.run_watched(load_recipe(recipe_file), tmp_path / "runs", Watch())
    assert said["results"] == results(tmp_path / "runs")
