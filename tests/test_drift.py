"""MPD, mean and covariance shift and CKA against their definitions; drift on tiny models, from the command line."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qcft import QcftError
from qcft.events import Watch
from qcft.inspect.apart import recipe_apart
from qcft.layers.change import squared_norm
from qcft.measure.shifts import Moments, layer_outputs, layer_shifts
from qcft.models.load import load_model
from qcft.recipe import Model, recipe_from

# Against the definitions


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    parts=st.lists(st.tuples(st.integers(1, 4), st.floats(-3, 3, allow_subnormal=False)), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_the_norm_of_a_sum_of_deltas_is_that_of_the_dense_sum(shape, parts, seed):
    rng = np.random.default_rng(seed)
    factors = [(rng.normal(size=(rank, shape[1])), rng.normal(size=(shape[0], rank)), scale) for rank, scale in parts]
    dense = sum(scale * b @ a for a, b, scale in factors)
    found = squared_norm([(torch.from_numpy(a), torch.from_numpy(b), scale) for a, b, scale in factors])
    size = sum(scale**2 * np.linalg.norm(b @ a) ** 2 for a, b, scale in factors)
    assert found == pytest.approx(np.linalg.norm(dense) ** 2, rel=1e-9, abs=1e-12 * (1 + size))


def test_a_delta_minus_itself_is_zero():
    a, b = torch.randn(4, 30), torch.randn(20, 4)
    assert squared_norm([(a, b, 2.0), (a, b, -2.0)]) ** 0.5 < 1e-6 * float(torch.linalg.norm(b @ a))


def cka(x, y):
    """Debiased linear CKA from Gram matrices, with Song et al.'s unbiased HSIC (2012, eq. 5) as they write it."""
    n = len(x)

    def hsic(k, m):
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        one = np.ones(n)
        inner = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
        return (inner - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3))

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


def moments(x, y, parts=1):
    sums = Moments(x.shape[1])
    for rows in np.array_split(np.arange(len(x)), parts):
        sums.add(torch.from_numpy(x[rows]), torch.from_numpy(y[rows]))
    return sums.shift()


@settings(deadline=None, max_examples=40)
@given(
    tokens=st.integers(6, 60),
    width=st.integers(1, 12),
    offset=st.floats(-50, 50),
    parts=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_moments_are_those_of_numpy_however_the_tokens_are_split(tokens, width, offset, parts, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, width)) + offset
    y = x @ rng.normal(size=(width, width)) + 0.3 * rng.normal(size=(tokens, width))
    found = moments(x, y, parts)
    cov_x, cov_y = (np.atleast_2d(np.cov(states, rowvar=False, bias=True)) for states in (x, y))
    mean = np.linalg.norm(y.mean(0) - x.mean(0)) / np.sqrt(np.trace(cov_x))
    assert found.mean_shift == pytest.approx(mean, rel=1e-6, abs=1e-9)
    assert found.covariance_shift == pytest.approx(np.linalg.norm(cov_y - cov_x) / np.linalg.norm(cov_x), rel=1e-6)
    assert found.cka == pytest.approx(cka(x, y), rel=1e-6, abs=1e-6)


def test_cka_does_not_depend_on_rotation_and_scale():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 16)) * np.arange(1, 17)
    turned = 3 * x @ np.linalg.qr(rng.normal(size=(16, 16)))[0] + 7
    assert moments(x, turned).cka == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("tokens", [40, 300])
def test_cka_of_independent_states_is_zero_however_few_the_tokens(tokens):
    """The plain estimate is 0.6 to 0.9 here; the mean over several draws, as one draw of few tokens is noisy."""
    rng = np.random.default_rng(1)
    draws = [moments(rng.normal(size=(tokens, 256)), rng.normal(size=(tokens, 256))).cka for _ in range(8)]
    assert np.mean(draws) == pytest.approx(0, abs=0.03)
    assert max(map(abs, draws)) < 0.15
    assert len({draw > 0 for draw in draws}) == 2


def test_cka_of_three_tokens_is_not_defined():
    with pytest.raises(QcftError, match="CKA needs 4 tokens, and the probe text has 3"):
        moments(np.eye(3), np.eye(3))


def test_states_that_are_not_finite_are_an_error():
    sums = Moments(2)
    sums.add(torch.tensor([[1.0, 2.0], [3.0, float("nan")]] * 2), torch.ones(4, 2))
    with pytest.raises(QcftError, match="not finite"):
        sums.shift()


def test_layer_outputs_are_the_hidden_states_and_groups_of_layers_change_nothing(tiny_model, monkeypatch):
    model = load_model(tiny_model, Model(name="tiny"), "none")
    row = [5, 6, 7, 8, 9]
    with torch.no_grad():
        states = model(torch.tensor([row]), output_hidden_states=True).hidden_states
    caught = layer_outputs(model, "model.layers", row, [0, 1])
    assert torch.equal(caught[0], states[1][0])
    assert torch.equal(caught[1], states[2][0])
    other = load_model(tiny_model, Model(name="tiny"), "nf4")
    rows = [row, [9, 10, 11, 12], [20, 21]]

    def shifts():
        run = [lambda r, ls, m=m: layer_outputs(m, "model.layers", r, ls) for m in (model, other)]
        return layer_shifts(*run, rows, 3, 64, Watch(), "test")

    together = shifts()
    monkeypatch.setattr("qcft.measure.shifts.SUM_BYTES", 3 * 8 * 64**2)  # one layer at a time
    assert shifts() == together
    assert all(0 < shift.covariance_shift < 1 and 0.5 < shift.cka < 1 for shift in together)


# On a run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tmp_path_factory.mktemp("drift") / "runs"


@pytest.fixture
def done(made, raw_recipe, qcft, tmp_path):
    """A run of two phases, the second with its lowest layer frozen; made once."""
    raw_recipe["phases"][1].pop("replay")
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**raw_recipe, "name": "two"}))
    code, _, error = qcft("run", tmp_path / "two.yaml", "--runs", made, "-q")
    assert code == 0, error
    return made


def drift_of(qcft, runs, *flags):
    code, out, error = qcft("drift", "two", *flags, "--runs", runs, "--json", "-q")
    assert code == 0, error
    return json.loads(out)


def delta(runs, phase):
    """B A times its scale of each module, dense, from the adapter's file."""
    factors = load_file(runs / "two" / phase / "adapter" / "adapter_model.safetensors")
    names = {name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")}
    return {n: 2.0 * factors[f"{n}.lora_B.weight"].double() @ factors[f"{n}.lora_A.weight"].double() for n in names}


def test_what_a_phase_moved_with_its_frozen_layer_still(done, qcft, tiny_model):
    found = drift_of(qcft, done)
    assert (found["from"], found["to"]) == ("merged", "phase2")
    dense = delta(done, "phase2")
    norms = [float(torch.linalg.norm(d)) for d in dense.values()]
    assert found["parameters"]["matrices"] == 21
    assert found["parameters"]["mpd"] == pytest.approx(sum(norms) / 21, rel=1e-9)
    assert found["parameters"]["norm"] == pytest.approx(sum(n**2 for n in norms) ** 0.5, rel=1e-9)
    both = delta(done, "phase1")
    summed = {name: both[name] + dense.get(name, 0) for name in both}
    base_to = sum(float(torch.linalg.norm(d)) for d in summed.values()) / 21
    assert found["parameters"]["pairs"]["base-to"] == pytest.approx(base_to, rel=1e-9)
    assert max(found["parameters"]["scaled"].values()) == 1
    first, second = found["layers"][0], found["layers"][1]
    assert (first["frozen"], second["frozen"]) == (True, False)
    assert first["mpd"] == 0 < second["mpd"]
    assert set(found["text"]) == {"en", "es", "pt"}
    for shift in first["languages"].values():
        assert shift == {"mean_shift": 0, "covariance_shift": 0, "cka": pytest.approx(1, abs=1e-12)}
    assert all(shift["cka"] < 1 - 1e-4 and shift["mean_shift"] > 1e-3 for shift in second["languages"].values())
    drawing = ET.parse(found["drawing"])
    assert any(element.tag.endswith("}pattern") for element in drawing.iter())  # the frozen layer is hatched


def test_from_a_live_phase_both_models_are_loaded_and_mpd_is_that_of_the_deltas(done, qcft):
    found = drift_of(qcft, done, "--from", "phase1", "--rows", "2")
    dense = delta(done, "phase2")
    norms = [float(torch.linalg.norm(d)) for d in dense.values()]
    assert found["parameters"]["mpd"] == pytest.approx(sum(norms) / 21, rel=1e-9)  # phase 1 is in both
    assert found["text"]["en"]["rows"] == 2
    assert found["layers"][0]["languages"]["en"]["cka"] < 1  # merging and 4 bits again have moved even the frozen layer


def test_the_factors_agree_with_the_weights_on_disk(done, qcft, monkeypatch):
    """A merge against the base: by factors, and streamed from both folders."""
    from qcft.inspect import mpd

    by_factors = drift_of(qcft, done, "--from", "base", "--to", "merged", "--rows", "1")
    monkeypatch.setattr(mpd, "deltas_of", lambda version, store: None)
    by_weights = drift_of(qcft, done, "--from", "base", "--to", "merged", "--rows", "2")  # another step
    assert by_weights["parameters"]["mpd"] == pytest.approx(by_factors["parameters"]["mpd"], rel=0.02)
    assert by_weights["parameters"]["mpd"] != by_factors["parameters"]["mpd"]
    code, out, error = qcft("drift", "two", "--rows", "3", "--runs", done, "--json")
    assert code == 0
    assert "differ by more than plain LoRA" in error
    assert json.loads(out)["parameters"]["mpd"] is None
    assert qcft("drift", "two", "--rows", "3", "--runs", done, "-q")[1].count("No MPD: drift: merged and phase2") == 1


def test_it_is_kept_shown_and_reported(done, qcft):
    drift_of(qcft, done)
    (done / "two" / "drift" / "merged-phase2" / "drift.json").touch()
    code, out, error = qcft("drift", "two", "--runs", done)
    assert code == 0
    assert "measuring" not in error
    assert "frozen" in out
    assert "MPD, the mean over 21 weight matrices" in out
    report = (done / "two" / "report" / "report.md").read_text()
    assert "**Drift from merged to phase2**" in report
    assert "](plots/drift-merged-phase2.svg)" in report
    stages = json.loads((done / "two" / "run.json").read_text())["stages"]
    assert stages["drift/merged-phase2"].startswith("drift-")
    # A run that is resumed keeps its comparisons.
    code, _, error = qcft("run", done / "two" / "recipe.yaml", "--runs", done, "-q")
    assert code == 0, error
    assert json.loads((done / "two" / "run.json").read_text())["stages"] == stages


def test_a_killed_drift_keeps_the_languages_it_measured(done, qcft, monkeypatch):
    from qcft.inspect import drift

    seen = []
    measured = drift.layer_shifts

    def counted(*arguments):
        seen.append(arguments[-1])
        if len(seen) == 2:
            raise KeyboardInterrupt
        return measured(*arguments)

    monkeypatch.setattr(drift, "layer_shifts", counted)
    assert qcft("drift", "two", "--rows", "4", "--runs", done, "-q")[0] == 130
    drift_of(qcft, done, "--rows", "4")
    assert [label[-2:] for label in seen] == ["en", "es", "es", "pt"]


def test_a_text_file_and_another_run(done, qcft, raw_recipe, tmp_path):
    (tmp_path / "text.txt").write_text("the cat runs\n\nwhat is a dog\n")
    found = drift_of(qcft, done, "--text", f"en={tmp_path / 'text.txt'}")
    assert found["text"]["en"]["rows"] == 2
    raw_recipe["phases"] = raw_recipe["phases"][:1]
    raw_recipe["phases"][0]["train"]["lr"] = 5e-3
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({**raw_recipe, "name": "one"}))
    assert qcft("run", tmp_path / "one.yaml", "--runs", done, "-q")[0] == 0
    found = drift_of(qcft, done, "--to", "phase1", "--against", "one", "--rows", "2")
    assert (found["from"], found["to"]) == ("one.phase1", "phase1")
    other = load_file(done / "one" / "phase1" / "adapter" / "adapter_model.safetensors")
    own = delta(done, "phase1")
    moved = [
        float(torch.linalg.norm(d - 2.0 * other[f"{n}.lora_B.weight"].double() @ other[f"{n}.lora_A.weight"].double()))
        for n, d in own.items()
    ]
    assert found["parameters"]["mpd"] == pytest.approx(sum(moved) / 21, rel=1e-6)


def apart(one, other):
    """MPD of what two trainings added, from their adapters' files."""
    found = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other)]
    names = {key.removesuffix(".lora_A.weight") for each in found for key in each if key.endswith(".lora_A.weight")}
    total = 0.0
    for name in names:
        a, b = (
            2.0 * f[f"{name}.lora_B.weight"].double() @ f[f"{name}.lora_A.weight"].double()
            if f"{name}.lora_A.weight" in f
            else 0.0
            for f in found
        )
        total += float(torch.linalg.norm(a - b))
    return total / 21


def test_mpd_is_beside_its_floor_and_the_papers_form_is_one_command(done, qcft):
    """Two seeds of one training are the floor: not measured, then by the command that is given."""
    command = f"qcft run {done}/two/recipe.yaml --runs {done} --set seed=1 --as two-seed1"
    found = drift_of(qcft, done, "--rows", "1")
    assert found["floor"] == {"phase": "phase2", "mpd": None, "runs": [], "measure": command}
    report = " ".join((done / "two" / "report" / "report.md").read_text().split())
    assert "Its floor, the MPD of two seeds of phase2's training, was not measured" in report
    assert qcft(*command.split()[1:], "-q")[0] == 0
    floor = drift_of(qcft, done, "--rows", "1")["floor"]
    assert floor["runs"] == ["two-seed1"]
    assert floor["mpd"] == pytest.approx(apart(done / "two" / "phase2", done / "two-seed1" / "phase2"), rel=1e-6)

    found = drift_of(qcft, done, "--apart", "--rows", "1")
    assert (found["from"], found["to"]) == ("two-apart.phase2", "phase1")
    alone = yaml.safe_load((done / "two-apart" / "recipe.yaml").read_text())
    assert [phase["freeze"] for phase in alone["phases"]] == ["none"]  # the run's phase 2 freezes a layer
    own = done / "two" / "phase1"
    assert found["parameters"]["mpd"] == pytest.approx(apart(own, done / "two-apart" / "phase2"), rel=1e-6)
    assert found["floor"]["mpd"] == pytest.approx(apart(own, done / "two-seed1" / "phase1"), rel=1e-6)
    code, out, error = qcft("drift", "two", "--apart", "--rows", "1", "--runs", done)
    assert code == 0, error
    assert "training" not in error
    floor = f"Its floor, the MPD of two seeds of phase1's training, is {found['floor']['mpd']:.3f}"
    assert floor in " ".join(out.split())


def test_a_phase_apart_is_not_evaluated_at_stages_it_lacks(raw_recipe):
    evaluate = {"tasks": ["fidelity"], "stages": ["base", "phase1", "phase2"]}
    alone = recipe_apart("two", recipe_from({**raw_recipe, "evaluate": evaluate}))
    assert [phase.name for phase in alone.phases] == ["phase2"]
    assert not alone.evaluate.tasks
    assert not alone.evaluate.stages


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--to", "phase3"], "no stage 'phase3'"),
        (["--from", "phase2"], "the same model"),
        (["--text", "nowhere.txt"], "no file 'nowhere.txt'"),
        (["--against", "nobody"], "no run 'nobody'"),
        (["--apart", "--to", "phase2"], "--apart chooses both models"),
        (["--text", "short.txt"], "has 3 tokens beside the first of each row, and CKA needs 4"),
    ],
)
def test_bad_comparisons_are_refused(done, qcft, tmp_path, flags, says):
    (tmp_path / "short.txt").write_text("the cat\n")
    code, out, error = qcft("drift", "two", *flags, "--runs", done)
    assert code == 2
    assert out == ""
    assert says in error


def test_a_run_of_another_base_is_refused(done, qcft, raw_recipe, tmp_path, tokenizer):
    from tests.helpers.tiny import make_llama

    raw_recipe["phases"] = raw_recipe["phases"][:1]
    raw_recipe["model"]["name"] = str(make_llama(tmp_path / "other", tokenizer, seed=5))
    raw_recipe["phases"][0]["train"]["steps"] = 1
    (tmp_path / "else.yaml").write_text(yaml.safe_dump({**raw_recipe, "name": "elsewhere"}))
    assert qcft("run", tmp_path / "else.yaml", "--runs", done, "-q")[0] == 0
    code, _, error = qcft("drift", "two", "--against", "elsewhere", "--runs", done)
    assert code == 2
    assert "elsewhere is of another base model than two" in error
    code, _, error = qcft("drift", "elsewhere", "--apart", "--runs", done)
    assert code == 2
    assert "--apart: elsewhere has one phase, phase1" in error
