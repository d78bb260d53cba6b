"""What a model folder holds: which files are the model, what beside them is refused, what its config may say."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qcft as package
from qcft.check.recipe import check_recipe
from qcft.events import Note, Watch
from qcft.layers import decoder_layers, linear_modules
from qcft.models.load import evaluating, load_model, load_tokenizer
from qcft.models.meta import model_without_weights
from qcft.models.names import stored_names
from qcft.models.size import quantised_share
from qcft.models.sources import resolve
from qcft.models.tensors import weight_files
from qcft.recipe import Model, recipe_from

from .helpers.families import make_family
from .helpers.tiny import make_color_data, make_recipe


@pytest.fixture
def folder(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def run(raw, tmp_path):
    return package.run(recipe_from(raw), runs=tmp_path / "runs")


def test_a_stale_index_is_not_the_model(folder, tiny_model, raw_recipe, tmp_path):
    """transformers loads model.safetensors, whatever an index beside it says; so do merging and the digest."""
    shard = {key: torch.zeros_like(weight) for key, weight in load_file(folder / "model.safetensors").items()}
    save_file(shard, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(shard, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in weight_files(folder)] == ["model.safetensors"]
    raw_recipe["model"]["name"] = str(folder)
    merged = run(raw_recipe, tmp_path).stages["merged"].folder / "model" / "model.safetensors"
    assert float(load_file(merged)["model.embed_tokens.weight"].abs().sum()) > 0
    before = resolve(Model(name=str(folder))).digest
    (folder / "model-00001-of-00001.safetensors").unlink()
    assert resolve(Model(name=str(folder))).digest == before


def test_shards_without_an_index_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(package.InputError, match=r"neither model\.safetensors nor an index"):
        resolve(Model(name=str(folder)))


def test_an_adapter_beside_the_weights_is_refused(folder, raw_recipe, tmp_path):
    (folder / "adapter_config.json").write_text("{}")
    raw_recipe["model"]["name"] = str(folder)
    with pytest.raises(package.InputError, match="holds an adapter beside its weights"):
        run(raw_recipe, tmp_path)
    assert not (tmp_path / "runs").exists()


def test_eight_bit_floats_without_their_scales_are_refused(folder, raw_recipe, tmp_path):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, folder / "model.safetensors", {"format": "pt"})
    raw_recipe["model"]["name"] = str(folder)
    with pytest.raises(package.InputError, match="8-bit floats"):
        run(raw_recipe, tmp_path)


@pytest.mark.parametrize("where", ["config", "generation_config only", "text_config"])
@pytest.mark.parametrize("pad", [None, -1, 10**6])
def test_end_tokens_may_be_a_list_and_padding_nothing_that_can_be_used(tiny_model, tmp_path, where, pad):
    if where == "text_config":
        folder = make_family("gemma3_wrapper", tmp_path / "model")
        raw = json.loads((folder / "config.json").read_text())
        raw["text_config"] |= {"eos_token_id": [2, 1], "pad_token_id": pad}
    else:
        folder = shutil.copytree(tiny_model, tmp_path / "model")
        raw = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [1, 2, 0], "pad_token_id": pad}
        if where != "config":
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": raw.pop("eos_token_id")}))
    (folder / "config.json").write_text(json.dumps(raw))
    named = Model(name=str(folder))
    assert model_without_weights(folder, named) is not None
    loaded = load_model(folder, named)
    with evaluating(loaded):
        assert loaded(input_ids=torch.arange(5, 12)[None]).logits.isfinite().all()


@pytest.mark.parametrize("family", ["gemma3_wrapper_same_depth", "gemma4_wrapper_same_depth"])
def test_the_language_model_is_adapted_whatever_is_as_deep(family, tmp_path):
    folder = make_family(family, tmp_path / family)
    meta = model_without_weights(folder, Model(name=str(folder)))
    assert decoder_layers(meta) == ("model.language_model.layers", 4)
    assert all(module.name.startswith("model.language_model.layers.") for module in linear_modules(meta))
    names = stored_names(meta, folder)
    assert {f"{module.name}.weight" for module in linear_modules(meta)} <= names.keys()


def test_the_encoders_of_a_wrapper_are_carried_over_unchanged(tmp_path):
    folder = make_family("gemma4_wrapper", tmp_path / "model")
    raw = make_recipe(folder, make_color_data(tmp_path / "data"))
    raw["merge"] = {"refuse_below": None}
    before = load_file(folder / "model.safetensors")
    after = load_file(run(raw, tmp_path).stages["merged"].folder / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert all("language_model.layers" in key for key in changed)


def test_experts_are_reported_to_stay_in_16_bits(tmp_path):
    folder = make_family("qwen3_moe", tmp_path / "model")
    named = Model(name=str(folder))
    meta, loaded = model_without_weights(folder, named), load_model(folder, named)
    packed = sum(2 * p.numel() for p in loaded.parameters() if p.dtype == torch.uint8)
    ends = meta.get_input_embeddings().weight.numel() + meta.get_output_embeddings().weight.numel()
    total = sum(p.numel() for p in meta.parameters()) - ends
    assert quantised_share(meta) == pytest.approx(packed / total)
    raw = make_recipe(folder, make_color_data(tmp_path / "data"))
    notes = []
    found = check_recipe(
        recipe_from(raw), tmp_path / "runs", Watch(lambda e: notes.append(e.text) if isinstance(e, Note) else None)
    )
    assert any("such as experts, stays in 16 bits and gets no adapter" in note for note in notes)
    assert found["quantised_share"] == pytest.approx(packed / total)
    assert found["phases"][0]["adapted_share"] <= found["quantised_share"]


def test_routers_get_no_adapter(tmp_path):
    for family in ("granitemoe", "phimoe", "qwen2_moe"):
        folder = make_family(family, tmp_path / family)
        names = [m.name for m in linear_modules(model_without_weights(folder, Model(name=str(folder))))]
        assert names
        assert not [name for name in names if "router" in name or name.endswith("gate")]


def test_what_cannot_be_estimated_is_a_warning(tmp_path):
    """Jamba's router needs numbers to be run at all: memory of weights and adapters is known, the rest is not."""
    folder, data = make_family("jamba", tmp_path / "model"), make_color_data(tmp_path / "data")
    found = check_recipe(recipe_from(make_recipe(folder, data)), tmp_path / "runs", Watch())
    for phase in found["phases"]:
        assert phase["memory"]["weights"] > 0
        assert (phase["unknown"] is None) == (phase["seconds"] is not None)


@pytest.mark.parametrize(("family", "attention"), [(None, "eager"), (None, "sdpa"), ("mistral_window", "sdpa")])
def test_padded_rows_train_from_stored_states_as_without(raw_recipe, tmp_path, family, attention):
    """`packing: false` and frozen layers, where attention uses a mask, too, as for rows past a sliding window:
    the rows' states are padded as the rows are."""
    raw_recipe["model"]["attn_implementation"] = attention
    if family:
        raw_recipe["model"]["name"] = str(make_family(family, tmp_path / "model"))
    losses = []
    for cached in (True, False):
        for phase in raw_recipe["phases"]:
            phase["train"] |= {"packing": False, "prefix_cache": cached}
            phase["freeze"] = "first:1"
        done = package.run(recipe_from(raw_recipe), runs=tmp_path / str(cached))
        assert done.stages["phase2"].metrics["prefix_cache"] is cached
        losses.append(done.stages["phase2"].metrics["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to offload from")
def test_activation_offloading_without_a_gpu_is_refused(raw_recipe, tmp_path):
    raw_recipe["phases"][0]["train"]["sft"] = {"activation_offloading": True}
    with pytest.raises(package.InputError, match="no GPU is used here"):
        run(raw_recipe, tmp_path)
    assert not (tmp_path / "runs").exists()


def test_the_merged_folder_of_a_wrapper_loads_elsewhere(tmp_path):
    folder = make_family("gemma3_wrapper", tmp_path / "model")
    raw = make_recipe(folder, make_color_data(tmp_path / "data"))
    raw["merge"] = {"refuse_below": None}
    merged = run(raw, tmp_path).stages["merged"].folder / "model"
    _, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_files_that_nothing_loads_neither_hang_nor_change_the_digest(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    before = resolve(Model(name=str(folder))).digest
    os.mkfifo(folder / "notes.txt")
    (folder / "more.json").symlink_to("/dev/zero")
    (folder / "README.txt").symlink_to("README.txt")
    (folder / "todo.txt").write_text("buy milk")
    assert resolve(Model(name=str(folder))).digest == before
    assert load_tokenizer(folder, Model(name=str(folder))).eos_token
    (folder / "vocab.txt").write_text("a")
    assert resolve(Model(name=str(folder))).digest != before


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"]
)
def test_pipes_in_the_place_of_a_models_files(tiny_model, tmp_path, name):
    folder = shutil.copytree(tiny_model, tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(package.InputError, match=r"no config\.json" if name == "config.json" else "is a named pipe"):
        resolve(Model(name=str(folder)))
