"""Runs of earlier versions are reused: every step is found under its id, and none is run again but those of a kind
whose results changed since."""

import json
import re
import tarfile
from pathlib import Path

import pytest

from qcft.files import read_json
from qcft.inspect.drift import Drift
from qcft.plan import make_plan
from qcft.plan.beyond import plan_beyond
from qcft.steps.step import Work

from .fixtures.make_runs import COMMANDS
from .helpers.typed import misfits

ARCHIVES = sorted((Path(__file__).parent / "fixtures").glob("runs-*.tar.xz"))
KINDS = {"probe", "train", "adapter", "merge", "pool", "replay", "kept", "layers", "dial", "drift", "suite"}
KNOWN = (make_plan, plan_beyond, Drift)  # imported so that all kinds are known


def unpacked(archive: Path, folder: Path) -> Path:
    """The archive's content, its run's recipes pointing at the folder it is in now."""
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    for recipe in folder.glob("runs/*/recipe.yaml"):
        text = recipe.read_text()
        recipe.write_text(re.sub(r"(\S*)/(model|adapter|data/\w+\.jsonl)$", rf"{folder}/\2", text, flags=re.MULTILINE))
    return folder


def records(runs: Path) -> dict[str, bytes]:
    """What each done step recorded, with the seconds it took: no second run writes the same."""
    return {file.parent.name: file.read_bytes() for file in runs.glob(".steps/*/done.json")}


def outdated(runs: Path) -> set[str]:
    """Steps of a kind that results in something else by now (its format was raised), and all that depend on
    such a step."""
    inputs = {file.parent.name: read_json(file)["inputs"] for file in runs.glob(".steps/*/step.json")}
    found = {step for step, one in inputs.items() if one["format"] != Work.kinds[one["kind"]].format}
    while True:
        below = {step for step, one in inputs.items() if any(other in json.dumps(one) for other in found)}
        if below <= found:
            return found
        found |= below


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.split(".")[0])
def test_runs_of_an_earlier_version_are_reused(archive, qcft, tmp_path):
    unpacked(archive, tmp_path)
    runs = tmp_path / "runs"
    before, old = records(runs), outdated(runs)
    assert {file.name.split("-")[0] for file in runs.glob(".steps/*-*")} == KINDS
    stages = {name: read_json(runs / name / "run.json")["stages"] for name in ("small", "taken-in")}
    for command in COMMANDS:
        code, _, err = qcft(*command)
        assert code == 0, err
    after = records(runs)
    kept = before.keys() - old
    assert kept
    assert {step: after[step] for step in kept} == {step: before[step] for step in kept}
    assert bool(after.keys() - before.keys()) == bool(old)
    assert misfits(runs) == []
    for name, wanted in stages.items():
        found = next(read_json(file) for file in sorted(runs.glob(f"{name}*/run.json"), reverse=True))["stages"]
        assert {stage for stage, step in wanted.items() if step not in old and found.get(stage) != step} == set()
