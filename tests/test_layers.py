"""Layers of every family, what phase 1 changed in them, their signal to noise, and `qcft layers`."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from qcft import InputError
from qcft.events import Watch
from qcft.layers import adapted_modules, decoder_layers, frozen_in_words, frozen_whole, linear_modules, lowest_adapted
from qcft.layers.change import change_between, change_by_adapter
from qcft.layers.snr import NO_NOISE, measure_snr, signal_to_noise, singular_values
from qcft.models.adapters import add_lora
from qcft.models.load import load_model
from qcft.recipe import Lora, Model, frozen_layers, frozen_modules, parse_freeze
from qcft.report.cells import noise_ratio

from .helpers.tiny import make_llama

FAMILIES = {
    "llama": 7,
    "mistral": 7,
    "qwen2": 7,
    "qwen3": 7,
    "gemma2": 7,
    "gemma3_text": 7,
    "phi": 6,
    "phi3": 4,
    "gpt_neox": 4,
}


def family(name, layers=4):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
    config = AutoConfig.for_model(name, num_hidden_layers=layers, **sizes)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    """Found from the model: its layers, all their linear modules, never the head; and a spec leaves the right ones."""
    model = family(name)
    assert decoder_layers(model)[1] == 4
    modules = linear_modules(model)
    assert len(modules) == 4 * FAMILIES[name]
    assert {m.layer for m in modules} == {0, 1, 2, 3}
    assert not any("head" in m.name or "embed" in m.name for m in modules)
    free = adapted_modules(model, "all-linear", parse_freeze("layers:0,2"), 0)
    assert len(free) == 2 * FAMILIES[name]
    assert frozen_whole(model, free) == [0, 2]
    assert lowest_adapted(model, free) == 1
    for i, module in enumerate(modules):
        assert model.get_submodule(module.name).weight.shape == module.shape
        assert module.type == modules[i % FAMILIES[name]].type
    assert frozen_in_words(model, "all-linear", free) == "layers 0, 2"
    words = f"layers 0, 2 and 1 of {len(modules)} modules in other layers"
    assert frozen_in_words(model, "all-linear", free[1:]) == words
    some = adapted_modules(model, "all-linear", parse_freeze("snr:0.5"), 0, {m.name: m.layer for m in modules})
    assert frozen_whole(model, some) == [0, 1]  # the lowest ratios


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_neox", "phi"])
def test_adapters_go_onto_other_families_in_4_bits(name, tmp_path, tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(name, num_hidden_layers=3, vocab_size=len(tokenizer), head_dim=16, **sizes)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_model(tmp_path, Model(name="tiny"))
    modules = adapted_modules(model, "all-linear", parse_freeze("first:1"), 0)
    adapted = add_lora(model, modules, Lora(r=2))
    ids = torch.tensor([[3, 4, 5]])
    adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    touched = {n for n, p in adapted.named_parameters() if p.grad is not None}
    assert len(touched) == 2 * len(modules)


def test_a_model_without_one_list_of_layers():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(InputError, match="hold no linear modules"):
        linear_modules(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64)))
    model = family("llama")
    model.config.num_hidden_layers = 9
    with pytest.raises(InputError, match="no list of its 9 decoder layers"):
        decoder_layers(model)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 12), st.lists(st.floats(0, 9), min_size=12, max_size=12), st.integers(1, 99))
def test_most_and_least_changed_are_mirrors(layers, change, percent):
    change = change[:layers]
    count = parse_freeze(f"most-changed:{percent / 100:.2f}").count(layers)
    if count == layers:
        return
    most = frozen_layers(parse_freeze(f"most-changed:{count}"), layers, change=change)
    least = frozen_layers(parse_freeze(f"least-changed:{count}"), layers, change=change)
    rest = set(range(layers)) - most
    assert len(most) == len(least) == count
    assert all(change[i] >= change[j] for i in most for j in rest)
    assert sum(change[i] for i in least) <= sum(change[i] for i in most) + 1e-9


@given(st.dictionaries(st.integers(0, 40), st.floats(0.01, 9), min_size=2), st.floats(0.05, 0.9))
def test_snr_freezes_the_share_of_each_type(values, share):
    spec = parse_freeze(f"snr:{share:.2f}")
    types = {str(i): "ab"[i % 2] for i in values}
    snr = {str(i): v for i, v in values.items()}
    counts = {t: spec.count(list(types.values()).count(t)) for t in set(types.values())}
    if sum(counts.values()) == len(types):
        with pytest.raises(InputError, match="nothing is left"):
            frozen_modules(spec, snr, types)
        return
    frozen = frozen_modules(spec, snr, types)
    for kind, count in counts.items():
        of_kind = [n for n in types if types[n] == kind]
        out = [n for n in of_kind if n in frozen]
        assert len(out) == count
        assert all(snr[a] <= snr[b] for a in out for b in of_kind if b not in frozen)


@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (12, 12), (1, 5)])
def test_singular_values_are_numpys_however_they_are_read(shape, monkeypatch):
    monkeypatch.setattr("qcft.layers.snr.BLOCK_BYTES", 8 * min(shape) * 4)  # four rows or columns at a time
    torch.manual_seed(1)
    matrix = torch.randn(shape).to(torch.bfloat16)
    expected = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    assert singular_values(matrix, *shape).flip(0).numpy() == pytest.approx(expected, rel=1e-9)


def test_the_ratio_is_spectrums():
    """Against its definition, written out with numpy."""
    rng = np.random.default_rng(0)
    for rows, columns, strength in [(40, 90, 0), (90, 40, 60), (64, 64, 300)]:
        matrix = (
            rng.normal(size=(rows, columns)) + strength * np.outer(rng.normal(size=rows), rng.normal(size=columns)) / 64
        )
        values = np.linalg.svd(matrix, compute_uv=False)
        quarter, three_quarters = np.quantile(values, [0.25, 0.75])
        sigma = (three_quarters - quarter) / 1.349
        edge = sigma * np.sqrt((1 + np.sqrt(min(rows, columns) / max(rows, columns))) ** 2)
        expected = (
            values[values > edge].sum() / values[values <= edge].sum() / values.max()
            if (values <= edge).any()
            else values.sum() / values.max() / NO_NOISE
        )
        assert signal_to_noise(torch.from_numpy(values), rows, columns) == pytest.approx(expected, rel=1e-12)
    assert signal_to_noise(torch.zeros(4), 4, 4) == 0


def test_matrices_without_noise_come_before_all_others_and_by_their_signal():
    """In Spectrum's order: it takes 1 for a noise that is none. Ties went to the lower layer before."""
    ratios = {
        name: signal_to_noise(torch.tensor(values, dtype=torch.float64), 4, 4)
        for name, values in {
            "0": [9.0, 8.9, 8.8, 5.0],  # none at or below the edge
            "1": [9.0, 8.9, 8.8, 8.7],
            "2": [1e6, 0.2, 0.1, 0.1],  # one value of signal, three of noise
            "3": [2.0, 2.0, 2.0, 2.0],
        }.items()
    }
    assert ratios["2"] < 10 < ratios["0"] < ratios["1"] < ratios["3"] < float("inf")
    assert frozen_modules(parse_freeze("snr:2"), ratios, dict.fromkeys(ratios, "q_proj")) == {"2", "0"}
    assert (noise_ratio(ratios["2"]), noise_ratio(ratios["3"])) == (f"{ratios['2']:.3g}", "no noise")


def test_snr_is_read_from_the_folder(tiny_model):
    model = load_model(tiny_model, Model(name="tiny"), quantize="none")
    names = [m.name for m in linear_modules(model)]
    ratios = measure_snr(tiny_model, model, names, Watch())
    for name in names:
        weight = model.get_submodule(name).weight.detach().double()
        assert ratios[name] == pytest.approx(signal_to_noise(torch.linalg.svdvals(weight), *weight.shape), rel=1e-6)
    with pytest.raises(InputError, match=r"no weight of its own for model.layers.9.x"):
        measure_snr(tiny_model, model, ["model.layers.9.x"], Watch())


@pytest.mark.parametrize("rslora", [False, True])
def test_change_from_the_factors_is_that_of_the_matrix(tiny_model, tmp_path, rslora):
    model = load_model(tiny_model, Model(name="tiny"), quantize="none")
    adapted = add_lora(
        model, adapted_modules(model, "all-linear", parse_freeze("first:1"), 0), Lora(r=3, alpha=5, rslora=rslora)
    )
    torch.manual_seed(2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(str(tmp_path))
    changes = change_by_adapter(tmp_path)
    layers = {n: m for n, m in adapted.get_base_model().named_modules() if hasattr(m, "get_delta_weight")}
    assert changes.keys() == layers.keys()
    for name, layer in layers.items():
        assert changes[name] == pytest.approx(
            float(layer.get_delta_weight("default").detach().double().square().sum()), rel=1e-5
        )


def test_change_between_two_models_is_streamed(tiny_model, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("qcft.layers.change.BLOCK_BYTES", 4096)
    other = make_llama(tmp_path / "other", tokenizer, seed=1)
    a, b = (load_model(f, Model(name="tiny"), quantize="none") for f in (tiny_model, other))
    names = [m.name for m in linear_modules(a)]
    changes = change_between(tiny_model, other, a, names, Watch())
    for name in names:
        difference = a.get_submodule(name).weight.double() - b.get_submodule(name).weight.double()
        assert changes[name] == pytest.approx(float(difference.square().sum()), rel=1e-9)
    wider = make_llama(tmp_path / "wider", tokenizer, hidden_size=128)
    with pytest.raises(InputError, match=r"model.base: .* is 64 x 64"):
        change_between(wider, tiny_model, a, names, Watch())


def run_small(qcft, raw_recipe, tmp_path, freeze, *more):
    import yaml

    for phase in raw_recipe["phases"]:
        phase["train"]["epochs"] = 1
    raw_recipe["phases"][1]["replay"] = None
    raw_recipe["answers"] = {"prompts": 0}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw_recipe))
    return qcft("run", "r.yaml", "--json", "--set", f"phase2.freeze={freeze}", *more)


def metrics_of(tmp_path, run="tiny", stage="phase2"):
    return json.loads((tmp_path / "runs" / run / stage / "done.json").read_text())["metrics"]


def test_a_run_freezes_by_change_and_by_snr_and_layers_prints_the_same(qcft, raw_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    code, _, err = run_small(qcft, raw_recipe, tmp_path, "most-changed:1")
    assert code == 0, err
    change = change_by_adapter(tmp_path / "runs" / "tiny" / "phase1" / "adapter")
    per_layer = [sum(v for n, v in change.items() if f".layers.{i}." in n) for i in range(3)]
    frozen = metrics_of(tmp_path)["frozen_layers"]
    assert frozen == [int(np.argmax(per_layer))]

    code, out, err = qcft("layers", "tiny", "--json", "--no-snr")
    assert code == 0, err
    table = json.loads(out)
    assert table["freeze"] == "most-changed:1"
    assert [layer["layer"] for layer in table["layers"] if not layer["adapted"]] == frozen
    assert [layer["change"] for layer in table["layers"]] == pytest.approx(per_layer)
    assert [layer["snr"] for layer in table["layers"]] == [None] * 3
    assert table["trainable_parameters"] == metrics_of(tmp_path)["trainable_parameters"]

    code, _, err = run_small(qcft, raw_recipe, tmp_path, "snr:0.5")
    assert code == 0, err
    assert "signal to noise" in err
    metrics = metrics_of(tmp_path, "tiny-2")
    assert metrics["adapted_modules"] == 7  # of 3 modules of each of 7 types, 2 are frozen (1.5 rounds up)
    adapter = json.loads((tmp_path / "runs" / "tiny-2" / "phase2" / "adapter" / "adapter_config.json").read_text())
    code, out, _ = qcft("layers", "tiny-2", "--json")
    table = json.loads(out)
    described = {
        f"model.layers.{layer['layer']}.{m['module']}"
        for layer in table["layers"]
        for m in layer["modules"]
        if m["adapter"]
    }
    assert described == set(adapter["target_modules"])
    assert all(m["snr"] > 0 for layer in table["layers"] for m in layer["modules"])

    code, out, err = qcft("layers", "tiny", "--freeze", "least-changed:2")
    assert code == 0, err
    assert out.count("frozen") >= 2
    assert "the backward pass stops at layer" in out


def test_an_instruct_models_change_is_that_from_its_base(qcft, raw_recipe, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    base = make_llama(tmp_path / "base", tokenizer)
    tuned = make_llama(tmp_path / "tuned", tokenizer)
    from safetensors.torch import load_file

    weights = load_file(tuned / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 1
    save_file(weights, tuned / "model.safetensors", metadata={"format": "pt"})
    raw_recipe["model"] = {"name": str(tuned)}
    raw_recipe["phases"] = [raw_recipe["phases"][1] | {"replay": None}]
    code, _, err = run_one(qcft, raw_recipe, tmp_path, "model.quantize=nf4")
    assert code == 2
    assert "depends on what an earlier phase changed" in err
    assert "hint: set model.base" in err
    assert not (tmp_path / "runs").exists()
    code, _, err = run_one(qcft, raw_recipe, tmp_path, f"model.base={base}")
    assert code == 0, err
    assert metrics_of(tmp_path)["frozen_layers"] == [1]
    code, out, err = qcft("layers", tuned, "--base", base, "--freeze", "most-changed:1", "--json", "--no-snr")
    assert code == 0, err
    assert [layer["layer"] for layer in json.loads(out)["layers"] if not layer["adapted"]] == [1]


def run_one(qcft, raw, tmp_path, setting):
    import yaml

    raw["phases"][0]["freeze"] = "most-changed:1"
    raw["answers"] = {"prompts": 0}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(raw))
    return qcft("run", "r.yaml", "--json", "--set", setting)


@pytest.mark.parametrize(
    ("arguments", "says", "hint"),
    [
        (["TINY", "--freeze", "most-changd:0.5"], "not a freeze spec", "did you mean 'most-changed'"),
        (["TINY", "--freeze", "first:9"], "asks for 9 layers, but the model has 3", "up to 2"),
        (["TINY", "--freeze", "snr:1.0"], "nothing is left to train", "fewer"),
        (["TINY", "--freeze", "snr:4"], "asks for 4 self_attn.q_proj modules", "up to 2"),
        (["TINY", "--freeze", "most-changed:0.5"], "depends on what an earlier phase changed", "model.base"),
        (["no-such-run"], "not an embedded model, a file or a folder", "embedded"),
        (["TINY", "--set", "lora.targets=[q_prj]"], "no linear module 'q_prj'", "q_proj"),
        (["TINY", "--base", "no/such/folder", "--freeze", "most-changed:1"], "no file or folder", "give"),
    ],
)
def test_layers_refuses(qcft, tiny_model, tmp_path, arguments, says, hint, monkeypatch):
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    code, out, err = qcft("layers", *[str(tiny_model) if a == "TINY" else a for a in arguments])
    assert (code, out) == (2, "")
    assert says in err
    assert hint in err
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()
