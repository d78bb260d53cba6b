"""The dial: one load, the ends are the phases themselves, a point can be merged; PEFT's methods beyond scaling."""

import json
import xml.etree.ElementTree as ET

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qcft import InputError
from qcft.runner.export import scales_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("dial") / "runs"


@pytest.fixture
def stack(made, raw_recipe, qcft, tmp_path):
    raw_recipe["phases"][1].pop("replay")
    raw_recipe["phases"][1].pop("freeze")
    raw_recipe["phases"][1]["start"] = "stacked"
    (tmp_path / "stack.yaml").write_text(yaml.safe_dump({**raw_recipe, "name": "stack"}))
    code, out, error = qcft("run", tmp_path / "stack.yaml", "--runs", made, "-q", "--json")
    assert code == 0, error
    return made, {s["stage"]: s["groups"] for s in json.loads(out)["stages"]}


def test_the_ends_of_the_dial_are_the_phases_and_a_point_is_merged(stack, qcft, tmp_path):
    runs, stages = stack
    command = ("dial", "stack", "--scales", "0:1:0.5", "--merge-at", "0.5", "--to", tmp_path / "half", "--runs", runs)
    code, out, error = qcft(*command, "--json", "-q")
    assert code == 0, error
    told = json.loads(out)
    points = told["points"]
    assert [p["scale"] for p in points] == [0, 0.5, 1]
    for point, stage in ((points[0], "eval/phase1"), (points[2], "eval/phase2")):
        assert point["groups"] == pytest.approx({name: g["nll"] for name, g in stages[stage].items()}, abs=1e-6)
    assert points[0]["MA"] > points[1]["MA"] > points[2]["MA"]
    assert told["merged"]["stage"] == "merged-phase2-at-0.5"
    assert (tmp_path / "half" / "model.safetensors").is_file()
    assert "0.5 of its delta" in (tmp_path / "half" / "README.md").read_text()
    ET.parse(told["drawing"])
    code, out, _ = qcft("dial", "stack", "--scales", "0:1:0.5", "--runs", runs, "-q")
    assert code == 0
    assert "EA" in out
    report = json.loads(qcft("show", "stack", "--runs", runs, "--json")[1])
    merged = next(s for s in report["stages"] if s["stage"] == "eval/merged-phase2-at-0.5")
    assert abs(merged["groups"]["phase2 es"]["nll"] - points[1]["groups"]["phase2 es"]) < 0.3


@pytest.mark.parametrize("method", ["ties", "dare_linear", "svd"])
def test_methods_beyond_scaling_are_pefts(stack, qcft, method, tmp_path):
    runs, _ = stack
    command = ("dial", "stack", "--scales", "1", "--method", method, "--density", "0.7", "--runs", runs)
    code, out, error = qcft(*command, "--merge-at", "1", "--to", tmp_path / "out", "--json", "-q")
    assert code == 0, error
    told = json.loads(out)
    assert told["merged"]["stage"] == f"merged-phase2-at-1-{method}-0.7"
    shown = json.loads(qcft("show", "stack", "--runs", runs, "--json")[1])
    merged = next(s for s in shown["stages"] if s["stage"] == f"eval/{told['merged']['stage']}")
    assert abs(merged["groups"]["phase2 es"]["nll"] - told["points"][0]["groups"]["phase2 es"]) < 0.3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--scales", "0:1"], "--scales"),
        (["--scales", "1:0:0.1"], "0 points"),
        (["--scales", "a"], "cannot be read"),
        (["--scales", "0:1:0.0001"], "10001 points"),
        (["--method", "tie"], "ties"),
        (["--density", "0"], "outside"),
        (["--stage", "phase9"], "no phase"),
    ],
)
def test_bad_dials_are_refused(stack, qcft, flags, says):
    code, _, error = qcft("dial", "stack", *flags, "--runs", stack[0])
    assert code == 2
    assert says in error


@given(st.integers(0, 20), st.integers(1, 20))
def test_scales_reach_both_ends(low, count):
    scales = scales_of(f"{low / 10}:{(low + count) / 10}:0.1")
    assert len(scales) == count + 1
    assert scales[0] == low / 10
    assert scales[-1] == (low + count) / 10


def test_a_list_of_scales():
    assert scales_of("0,0.7,1") == (0, 0.7, 1)
    with pytest.raises(InputError):
        scales_of("nan")
