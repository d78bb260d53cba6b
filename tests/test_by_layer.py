"""A delta scaled by layer: what is read, and that a live adapter, a merge and an export all take just that."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from qcft import InputError
from qcft.events import Watch
from qcft.files import read_json
from qcft.layers import adapted_modules, decoder_layers, scales_by_layer
from qcft.models.adapter_config import CONFIG, PREFIX, WEIGHTS
from qcft.models.adapters import add_lora, load_adapter, set_scale
from qcft.models.combine import write_adapter
from qcft.models.load import load_model
from qcft.models.merge import merge_adapters
from qcft.recipe import ByLayer, Lora, Model, parse_by_layer, parse_freeze
from qcft.recipe.by_layer import patterns

LAYERS = st.lists(st.sampled_from([0.0, 0.25, 1 / 3, 1.0, 2.0]), min_size=1, max_size=12)


@given(LAYERS)
def test_what_is_written_is_read_again_with_equal_scales(scales):
    found = ByLayer.of((i, i, scale) for i, scale in enumerate(scales))
    assert [found.scale(i) for i in range(len(scales))] == scales
    assert found.scale(len(scales)) == found.scale(None) == 1
    if found.ranges:
        assert parse_by_layer(str(found)) == found
        assert len(found.path) <= 60
        assert not set(found.path) & set(":,=/ ")


def test_equal_scales_have_one_name():
    written = ["layers=10-19:0.5", "layers=20-29:1, 10-19 : .5", "layers=15-19:0.5,0-9:1.0,10-14:5e-1"]
    assert {str(parse_by_layer(text)) for text in written} == {"layers=10-19:0.5"}
    assert str(parse_by_layer("layers=3:-0")) == "layers=3:0"


@pytest.mark.parametrize("layers", [range(2), range(3), range(20, 30), range(30), [0, 7]])
def test_patterns_scale_layers_that_have_a_delta(layers):
    tried = patterns(layers)
    assert len(set(tried)) == len(tried)
    for one in tried:
        assert any(one.scale(layer) < 1 for layer in layers)
        assert any(one.scale(layer) == 1 for layer in layers)
        one.check(max(layers) + 1)
    if len(layers) == 30:
        assert [str(one) for one in tried] == [
            "layers=0-9:0.5", "layers=0-9:0", "layers=10-19:0.5", "layers=10-19:0", "layers=20-29:0.5",
            "layers=20-29:0", "layers=0-4:0", "layers=25-29:0",
        ]  # fmt: skip


@pytest.mark.parametrize("layers", [[], [4]])
def test_one_layer_alone_has_no_patterns(layers):
    with pytest.raises(InputError, match="nothing to scale"):
        patterns(layers)


@pytest.fixture(params=[False, True], ids=["alpha over r", "rslora"])
def adapter(request, tiny_model, tmp_path):
    """The tiny model in fp32 in a folder, and an adapter on it with random factors in another."""
    model = load_model(tiny_model, Model(name="tiny"), quantize="none").float()
    model.save_pretrained(tmp_path / "base")
    lora = Lora(r=4, alpha=8, rslora=request.param)
    adapted = add_lora(model, adapted_modules(model, "all-linear", parse_freeze("none"), 0), lora)
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "base", tmp_path / "adapter"


def by_hand(base, adapter, scales):
    """The base's weights with each layer's delta scaled, by numpy in fp64."""
    config, factors = read_json(adapter / CONFIG), load_file(adapter / WEIGHTS)
    scaling = config["lora_alpha"] / (np.sqrt(config["r"]) if config["use_rslora"] else config["r"])
    weights = {name: w.astype(np.float64) for name, w in load_file(base / "model.safetensors").items()}
    for name, a in factors.items():
        if ".lora_A." in name:
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            b = factors[name.replace("lora_A", "lora_B")]
            layer = int(module.split(".")[2])
            weights[f"{module}.weight"] += scales[layer] * scaling * (b.astype(np.float64) @ a.astype(np.float64))
    return weights


def test_a_live_adapter_a_merge_and_an_export_scaled_by_layer_are_the_sum_by_hand(adapter, tmp_path):
    base, folder = adapter
    by = parse_by_layer("layers=0:0.25,2:0")
    wanted = by_hand(base, folder, [0.25, 1, 0])
    plain = load_model(base, Model(name="m"), quantize="none").float()
    assert decoder_layers(plain)[1] == 3
    scales = scales_by_layer(plain, by)
    reference = load_model(base, Model(name="m"), quantize="none").float()
    state = {name: torch.tensor(w, dtype=torch.float32) for name, w in wanted.items()}
    assert not reference.load_state_dict(state, strict=False).unexpected_keys
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = reference(ids).logits
        untouched = plain(ids).logits
        live = load_adapter(plain, folder)
        set_scale(live, 0.5)
        set_scale(live, scales)
        assert torch.allclose(live(ids).logits, expected, atol=1e-4)
        assert not torch.allclose(untouched, expected, atol=1e-2)
        (tmp_path / "merged").mkdir()
        merge_adapters(base, [(folder, scales)], tmp_path / "merged", Watch())
        merged = load_file(tmp_path / "merged" / "model.safetensors")
        assert all(np.allclose(w, wanted[name], atol=1e-6) for name, w in merged.items())
        (tmp_path / "export").mkdir()
        write_adapter([folder], tmp_path / "export", "m", scales)
        again = load_adapter(load_model(base, Model(name="m"), quantize="none").float(), tmp_path / "export")
        assert torch.allclose(again(ids).logits, expected, atol=1e-4)
