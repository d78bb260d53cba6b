"""Runs that earlier versions made are reused whole: every step is found under its id, and none is run again."""

import re
import tarfile
from pathlib import Path

import pytest

from qcft.files import read_json

from .fixtures.make_runs import COMMANDS

ARCHIVES = sorted((Path(__file__).parent / "fixtures").glob("runs-*.tar.xz"))
KINDS = {"probe", "train", "adapter", "merge", "pool", "replay", "kept", "layers", "dial", "drift", "suite"}


def unpacked(archive: Path, folder: Path) -> Path:
    """The archive's content, its run's recipes pointing at the folder it lies in now."""
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    for recipe in folder.glob("runs/*/recipe.yaml"):
        text = recipe.read_text()
        recipe.write_text(re.sub(r"(\S*)/(model|adapter|data/\w+\.jsonl)$", rf"{folder}/\2", text, flags=re.MULTILINE))
    return folder


def records(runs: Path) -> dict[str, bytes]:
    """What each done step recorded, with the seconds it took: no second run writes the same."""
    return {file.parent.name: file.read_bytes() for file in runs.glob(".steps/*/done.json")}


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.split(".")[0])
def test_runs_of_an_earlier_version_are_reused(archive, qcft, tmp_path):
    unpacked(archive, tmp_path)
    runs = tmp_path / "runs"
    before, steps = records(runs), {path.name for path in runs.glob(".steps/*-*")}
    assert {step.split("-")[0] for step in steps} == KINDS
    stages = {name: read_json(runs / name / "run.json")["stages"] for name in ("small", "taken-in")}
    for command in COMMANDS:
        code, _, err = qcft(*command)
        assert code == 0, err
    assert {path.name for path in runs.glob(".steps/*-*")} == steps
    assert records(runs) == before
    assert {name: read_json(runs / name / "run.json")["stages"] for name in stages} == stages
