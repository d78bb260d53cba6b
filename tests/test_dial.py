"""The dial: one load, the ends are the phases themselves, a point can be merged; PEFT's methods beyond scaling."""

import csv
import json
import shlex
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qcft import InputError, api, deliveries
from qcft.events import Progress, Watch
from qcft.inspect.versions import deltas_of, version_of
from qcft.models.adapters import load_adapter
from qcft.models.load import load_model
from qcft.recipe import Model
from qcft.report.curve import point_label
from qcft.report.shown import Picked
from qcft.report.standing import mean_of
from qcft.runner.dialling import scales_of
from qcft.store import Store
from qcft.store import read_run as open_named

from .helpers.bad_input import check_refused
from .helpers.typed import misfit


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("dial") / "runs"


@pytest.fixture
def stack(made, raw_recipe, qcft, tmp_path):
    """The folder of runs of one test, with the run `stack`, which no dial has measured; its stages."""
    raw_recipe["phases"][1].pop("replay")
    raw_recipe["phases"][1].pop("freeze")
    raw_recipe["phases"][1]["start"] = "stacked"
    raw_recipe["heldout"] = {"share": 0.4, "rows": 18}
    (tmp_path / "stack.yaml").write_text(yaml.safe_dump({**raw_recipe, "name": "stack"}))
    code, out, error = qcft("run", tmp_path / "stack.yaml", "--runs", made, "-q", "--json")
    assert code == 0, error
    shutil.copytree(made, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs", {s["stage"]: s["groups"] for s in json.loads(out)["stages"]}


def test_the_ends_of_the_dial_are_the_phases_and_a_point_is_merged(stack, qcft, tmp_path):
    runs, stages = stack
    command = ("dial", "stack", "--scales", "0:1:0.5", "--merge-at", "0.5", "--to", tmp_path / "half", "--runs", runs)
    code, out, error = qcft(*command, "--json", "-q")
    assert code == 0, error
    output = json.loads(out)
    points = output["points"]
    assert [p["scale"] for p in points] == [0, 0.5, 1]
    for point, stage in ((points[0], "eval/phase1"), (points[2], "eval/phase2")):
        assert point["groups"] == pytest.approx({name: g["nll"] for name, g in stages[stage].items()}, abs=1e-6)
    assert points[0]["MA"] > points[1]["MA"] > points[2]["MA"]
    assert output["merged"]["stage"] == "merged-phase2-at-0.5"
    assert (tmp_path / "half" / "model.safetensors").is_file()
    assert "0.5 of its delta" in (tmp_path / "half" / "README.md").read_text()
    code, _, error = qcft(*(tmp_path / "again" if part == tmp_path / "half" else part for part in command))
    assert code == 0, error
    assert f"next: load it as {tmp_path / 'again' / 'README.md'} shows" in error.replace("\n", " ")
    ET.parse(output["drawing"])
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
    output = json.loads(out)
    assert output["merged"]["stage"] == f"merged-phase2-at-1-{method}-0.7"
    shown = json.loads(qcft("show", "stack", "--runs", runs, "--json")[1])
    merged = next(s for s in shown["stages"] if s["stage"] == f"eval/{output['merged']['stage']}")
    assert abs(merged["groups"]["phase2 es"]["nll"] - output["points"][0]["groups"]["phase2 es"]) < 0.3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--scales", "0:1"], "--scales"),
        (["--scales", "1:0:0.1"], "0 points"),
        (["--scales", "a"], "cannot be read"),
        (["--scales", "0:1:0.0001"], "10001 points"),
        (["--method", "tie"], "'tie' is not known"),
        (["--density", "0"], "outside"),
        (["--stage", "phase9"], "no phase"),
        (["--by", "layers=0-3:0.5"], "names layer 3, but the model's layers are 0 to 2"),
        (["--by", "layers=0-1:0", "--by", "layers=9:0"], "names layer 9"),
        (["--by", "auto", "--method", "ties"], "--by cannot be combined with --method"),
    ],
)
def test_bad_dials_are_refused(stack, qcft, flags, says):
    check_refused(qcft, stack[0], ["dial", "stack", *flags, "--runs", stack[0], "-q"], says)


@pytest.mark.parametrize("command", ["merge", "export", "export --adapter-only"])
def test_no_delivery_names_layers_that_the_model_lacks(stack, qcft, tmp_path, command):
    flags = ["--by", "layers=2-9:0", "--to", tmp_path / "out", "--runs", stack[0], "-q"]
    check_refused(qcft, tmp_path, [*command.split(), "stack", *flags], "names layer 9")


@pytest.fixture
def frozen(stack, qcft, raw_recipe, tmp_path):
    """The runs folder with a second run beside the stack, `one`, whose phase 2 trains the top layer alone."""
    runs, _ = stack
    raw_recipe["phases"][1]["freeze"] = "first:2"
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({**raw_recipe, "name": "one"}))
    code, _, error = qcft("run", tmp_path / "one.yaml", "--runs", runs, "-q")
    assert code == 0, error
    return runs


def test_nothing_is_scaled_by_layers_where_one_layer_alone_has_a_delta(frozen, qcft):
    command = ["dial", "one", "--by", "auto", "--runs", frozen, "-q"]
    check_refused(qcft, frozen, command, "layer 2 alone has a delta")


def test_arms_that_were_dialled_are_compared_at_an_equal_gain(frozen, qcft, tmp_path):
    curves = {}
    for run in ("stack", "one"):
        code, out, error = qcft("dial", run, "--scales", "0:1:0.5", "--runs", frozen, "--json", "-q")
        assert code == 0, error
        stages = {s["stage"]: s["groups"] for s in api.read(run, frozen).table["stages"]}
        base, before = stages["eval/base"], stages["eval/phase1"]
        points = json.loads(out)["points"]
        gains = [mean_of(g for g in base.values() if g["lang"] != "en") - p["MA"] for p in points]
        english = [p["EA"] - mean_of(g for g in before.values() if g["lang"] == "en") for p in points]
        assert gains == sorted(gains)  # the tiny models learn, so np.interp may be asked
        curves[run] = gains, english
    code, out, error = qcft("report", "stack", "one", "--to", tmp_path / "page", "--runs", frozen, "--json")
    assert code == 0, error
    with (tmp_path / "page" / "tables" / "equal-gain.csv").open() as file:
        rows = {(row["arm"], row["measure"]): row for row in csv.DictReader(file)}
    least = min(curves, key=lambda run: curves[run][0][-1])
    for run, (gains, english) in curves.items():
        assert float(rows[run, "english_own"]["value"]) == pytest.approx(
            np.interp(0.95 * gains[-1], gains, english), abs=1e-6
        )
        equal = np.interp(0.95 * curves[least][0][-1], gains, english)
        assert float(rows[run, "english_equal"]["value"]) == pytest.approx(equal, abs=1e-6)
        assert rows[run, "english_equal"]["of"] == least


def test_points_by_layers_join_the_scales_that_were_measured(stack, qcft, tmp_path):
    runs, _ = stack
    assert qcft("dial", "stack", "--scales", "0:1:0.5", "--runs", runs, "-q")[0] == 0
    before = open_named(runs, "stack").stages["dial-phase2"]
    measured = []
    by = ["layers=0-2:0.5", "layers=1-2:0,0:1", "auto"]
    found = deliveries.dial("stack", "0:1:0.5", runs, Watch(measured.append), by=by)
    points = found["points"]
    labels = {event.label for event in measured if isinstance(event, Progress)}
    assert any("dial phase2 at layers 1-2 at 0:" in label for label in labels)
    assert not any(f"dial phase2 at {scale}:" in label for scale in ("0", "0.5", "1") for label in labels)
    assert [p["scale"] for p in points[:3]] == [0, 0.5, 1]
    assert [p["by"] for p in points[3:5]] == ["layers=0-2:0.5", "layers=1-2:0"]
    assert {"layers=0:0", "layers=2:0", "layers=1:0.5"} <= {p["by"] for p in points[3:]}
    assert points[3]["groups"] == pytest.approx(points[1]["groups"], abs=1e-6)  # 0.5 of every layer
    assert points[0]["MA"] > points[4]["MA"] > points[2]["MA"]
    after = open_named(runs, "stack").stages["dial-phase2"]
    assert after != before
    page = (runs / "stack" / "report" / "report.md").read_text()
    assert "layers 1-2 at 0" in page
    ET.parse(found["drawing"])
    assert qcft("dial", "stack", "--scales", "0:1:0.5", "--runs", runs, "-q")[0] == 0  # the run has them
    assert open_named(runs, "stack").stages["dial-phase2"] == after


def test_new_scales_join_those_that_were_measured(stack, qcft):
    runs, _ = stack
    measured = []
    deliveries.dial("stack", "0.5,1", runs, Watch(lambda _: None))
    found = deliveries.dial("stack", "0.25,1", runs, Watch(measured.append), by=["layers=0:0"])
    labels = {event.label for event in measured if isinstance(event, Progress)}
    assert any("dial phase2 at 0.25:" in label for label in labels)
    assert not any(f"dial phase2 at {scale}:" in label for scale in ("0.5", "1") for label in labels)
    assert [point_label(point) for point in found["points"]] == ["0.25", "0.5", "1", "layer 0 at 0"]
    again = deliveries.dial("stack", None, runs, Watch(lambda _: None), by=["layers=1:0"])  # no scales of its own
    assert [point["scale"] for point in again["points"][:3]] == [0.25, 0.5, 1]
    assert len(again["points"]) == 5
    with pytest.raises(InputError, match="the dial has 206 points"):
        deliveries.dial("stack", "0:0.2:0.001", runs, Watch(lambda _: None))


@pytest.mark.parametrize("flags", [["--scale", "0.5"], ["--by", "layers=0-1:0.5"]])
def test_a_part_of_the_delta_is_delivered_as_a_model_and_as_an_adapter(stack, qcft, tmp_path, flags):
    runs, _ = stack
    for to, more in (("model", []), ("adapter", ["--adapter-only"])):
        code, _, error = qcft("export", "stack", *flags, *more, "--to", tmp_path / to, "--runs", runs, "-q")
        assert code == 0, error
        said = "0.5 of its delta" if "--scale" in flags else "its delta with layers 0-1 at 0.5"
        card = (tmp_path / to / "README.md").read_text()
        assert said in card
        assert ("is measured with all of its delta" in card) == bool(more)
    named, store = open_named(runs, "stack"), Store(runs)
    stage = next(s for s in named.stages if s.startswith(f"merged-phase2-at-{'0.5' if '--scale' in flags else 'lay'}"))
    held = deltas_of(version_of(named, stage, store), store)  # what drift goes by, which knows no layers
    assert (sorted(held.values()) == [0.5, 1]) if "--scale" in flags else (held is None)
    merged = load_model(tmp_path / "model", Model(name="m"), quantize="none").float()
    base = load_model(Path(open_named(runs, "stack").recipe().model.name), Model(name="m"), quantize="none").float()
    adapted = load_adapter(base, tmp_path / "adapter")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=0.05)  # merged weights are rounded to bf16


def test_a_point_is_picked_and_can_be_delivered(stack, qcft, tmp_path):
    runs, _ = stack
    code, out, error = qcft(
        "dial", "stack", "--scales", "0:1:0.25", "--by", "layers=0:0", "--pick", "0.6", "--runs", runs, "--json", "-q"
    )
    assert code == 0, error
    pick = json.loads(out)["pick"]
    assert misfit(pick, Picked) is None
    assert pick["points"] == 6
    chosen, reported = pick["chosen"], pick["reported"]
    assert chosen["english"]["rows"] + reported["english"]["rows"] == 18
    assert chosen["others"]["rows"] + reported["others"]["rows"] == 18  # of es and pt, which are parallel
    assert chosen["kept"]["value"] >= 0.6
    assert reported["kept"]["low"] < reported["kept"]["value"] < reported["kept"]["high"]
    code, out, error = qcft("dial", "stack", "--pick", "0.6", "--runs", runs, "-q")  # the points that the run has
    assert code == 0, error
    assert "Of 6 points" in out
    command = next(line for line in out.splitlines() if line.startswith("next: "))
    assert str(runs) in command
    words = shlex.split(command.removeprefix("next: qcft ").replace("FOLDER", str(tmp_path / "picked")))
    code, out, error = qcft(*words, "-q")
    assert code == 0, error
    assert (tmp_path / "picked" / "model.safetensors").is_file()


def test_a_pick_uses_english_that_nothing_trains_on(stack, raw_recipe, qcft, tmp_path):
    """`stack` has made `raw_recipe` its own; here it has 20 English rows of another kind besides."""
    runs, _ = stack
    rows = [json.dumps({"instruction": f"what follows {n}", "output": f"{n + 1} is blue"}) for n in range(20)]
    (tmp_path / "other.jsonl").write_text("\n".join(rows))
    raw_recipe["heldout"]["data"] = [{"path": str(tmp_path / "other.jsonl"), "lang": "en"}]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**raw_recipe, "name": "other"}))
    assert qcft("run", tmp_path / "other.yaml", "--runs", runs, "-q")[0] == 0
    code, out, error = qcft("dial", "other", "--scales", "0,0.5,1", "--pick", "0.5", "--runs", runs, "--json", "-q")
    assert code == 0, error
    pick = json.loads(out)["pick"]
    assert pick["chosen"]["english"]["rows"] + pick["reported"]["english"]["rows"] == 20
    assert pick["chosen"]["others"]["rows"] + pick["reported"]["others"]["rows"] == 18


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
