"""Models that leave the runs folder: whole or not there, loadable by others, with a card."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qcft.events import Watch
from qcft.files import read_json
from qcft.models.adapters import load_stack
from qcft.models.load import evaluating, load_model
from qcft.models.merge import MARK
from qcft.recipe import Model

from .helpers.merge_kills import kill_merges
from .helpers.tiny import make_llama, make_recipe

IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A runs folder where the module's runs are made once."""
    return tmp_path_factory.mktemp("export") / "runs"


@pytest.fixture
def runs(made, raw_recipe, qcft, tmp_path):
    """Two runs: `tiny`, whose phase 2 starts merged, and `stack`, whose phase 2 is stacked."""
    raw_recipe["phases"][1].pop("replay")
    for name, start in (("tiny", "merged"), ("stack", "stacked")):
        raw_recipe["phases"][1]["start"] = start
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**raw_recipe, "name": name}))
        code, _, error = qcft("run", tmp_path / f"{name}.yaml", "--runs", made, "-q")
        assert code == 0, error
    return made


def logits(model):
    with evaluating(model):
        return model(IDS).logits.float()


def of(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.mark.parametrize("name", ["tiny", "stack"])
def test_a_merged_phase_is_measured_and_loads_elsewhere(runs, qcft, tiny_model, name, tmp_path):
    code, out, error = qcft("merge", name, "--runs", runs, "--to", tmp_path / "out", "--json", "-q")
    assert code == 0, error
    output = json.loads(out)
    assert output["stage"] == "merged-phase2"
    assert output["kept"]["share"] is None or output["kept"]["share"] > 0.4
    assert read_json(runs / name / "kept-merged-phase2" / "done.json")["metrics"]["kl"] == output["kept"]["kl"]
    assert "phase2 merged, NF4" in (runs / name / "report" / "report.md").read_text()
    out = tmp_path / "out"
    model, tokenizer = of(out), AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template
    assert (out / "generation_config.json").is_file()
    assert torch.isfinite(logits(model)).all()
    card = (out / "README.md").read_text()
    assert {"EA (English)", "MA (other languages)"} <= {cell.strip() for cell in card.split("|")}
    front = yaml.safe_load(card.split("---")[1])
    assert front["language"] == ["en", "es", "pt"]
    assert front["base_model"] == tiny_model.name
    assert "pipeline(" in card
    assert no_local_path(out, tiny_model)
    assert no_local_path(runs / name / "report", tiny_model)
    again = qcft("merge", name, "--runs", runs, "--to", tmp_path / "again", "-q")
    assert again[1].strip() == str(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_the_folder_is_what_llama_cpps_converter_reads(runs, qcft, tmp_path):
    import gguf

    assert qcft("export", "tiny", "--runs", runs, "--to", tmp_path / "out", "-q")[0] == 0
    folder = tmp_path / "out"
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    vocab = gguf.SpecialVocab(folder, load_merges=True)  # what the converter reads beside the weights
    assert vocab.chat_template
    assert vocab.merges
    assert vocab.special_token_ids["eos"] == AutoTokenizer.from_pretrained(folder).eos_token_id


def test_lm_eval_loads_the_folder(runs, qcft, tmp_path):
    lm_eval = pytest.importorskip("lm_eval.models.huggingface")
    assert qcft("export", "tiny", "--runs", runs, "--to", tmp_path / "out", "-q")[0] == 0
    assert lm_eval.HFLM(pretrained=str(tmp_path / "out"), device="cpu").model


def no_local_path(folder, model):
    """Whether no file that can be read names the folder that tests write to; the names that files have are there."""
    texts = [p.read_text(errors="replace") for p in folder.rglob("*") if p.suffix in {".json", ".md", ".html", ".csv"}]
    assert any(model.name in text for text in texts)
    return not any(str(place) in text for text in texts for place in (model.parent, Path.home(), folder.parent))


@pytest.mark.parametrize("name", ["tiny", "stack"])
def test_one_adapter_holds_all_phases_for_the_unmodified_model(runs, qcft, tiny_model, name, tmp_path):
    code, _, error = qcft("export", name, "--runs", runs, "--to", tmp_path / "adapter", "--adapter-only", "-q")
    assert code == 0, error
    assert qcft("export", name, "--runs", runs, "--to", tmp_path / "model", "-q")[0] == 0
    config = read_json(tmp_path / "adapter" / "adapter_config.json")
    assert config["base_model_name_or_path"] == tiny_model.name
    assert no_local_path(tmp_path / "adapter", tiny_model)
    assert "library_name: peft" in (tmp_path / "adapter" / "README.md").read_text()
    merged = PeftModel.from_pretrained(of(tiny_model), tmp_path / "adapter").merge_and_unload().state_dict()
    for key, tensor in load_file(tmp_path / "model" / "model.safetensors").items():
        # merged starts round to 16 bits between the phases, so equal up to that
        assert (tensor.float() - merged[key]).norm() <= 0.006 * merged[key].norm(), key
    if name == "stack":
        live = load_stack(of(tiny_model), [(runs / name / f"phase{n}").resolve() / "adapter" for n in (1, 2)])
        alone = PeftModel.from_pretrained(of(tiny_model), tmp_path / "adapter")
        assert torch.allclose(logits(live), logits(alone), atol=1e-4)


def test_a_dequantised_base_gives_the_live_model_in_16_bits_and_is_refused_in_4(runs, qcft, raw_recipe, tmp_path):
    code, _, error = qcft("merge", "tiny", "--stage", "phase1", "--base", "dequantised", "--runs", runs, "--to", "x")
    assert code == 2
    assert "phase2 loads phase1 merged in 4 bits again" in error
    command = ("merge", "stack", "--base", "dequantised", "--runs", runs, "--to", tmp_path / "out", "--json", "-q")
    code, out, error = qcft(*command)
    assert code == 0, error
    kept = json.loads(out)["kept"]
    assert kept["kl"] < 0.01
    plain = json.loads(qcft("merge", "stack", "--runs", runs, "--json", "-q")[1])["kept"]
    assert kept["kl"] < plain["kl"]
    assert read_json(tmp_path / "out" / MARK)["merged_onto"] == "dequantised"
    recipe = {**raw_recipe, "model": str(tmp_path / "out"), "name": "again"}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe))
    code, _, error = qcft("run", tmp_path / "again.yaml", "--runs", tmp_path / "runs")
    assert code == 2
    assert "dequantised base" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["merge", "tiny", "--stage", "phase3", "--to", "x"], "no phase 'phase3'"),
        (["merge", "tiny", "--to", "full"], "already exists"),
        (["export", "tiny", "--to", "file/x"], "is a file"),
        (["merge", "tiny", "--base", "nf4", "--to", "x"], "nf4"),
        (["export", "tiny"], "--to"),
    ],
)
def test_bad_input_is_refused_before_any_work(runs, qcft, arguments, says, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "file").touch()
    before = sorted(p.name for p in (runs / ".steps").iterdir())
    code, _, error = qcft(*arguments, "--runs", runs)
    assert code == 2
    assert says in error
    assert sorted(p.name for p in (runs / ".steps").iterdir()) == before


def test_a_merge_killed_at_random_is_complete_or_absent(runs, tiny_model, tmp_path):
    adapter = (runs / "tiny" / "phase1").resolve() / "adapter"
    assert kill_merges(tiny_model, adapter, tmp_path / "out", 3, seed=0, shard=40_000, block=64)
    assert torch.isfinite(logits(of(tmp_path / "out"))).all()


def test_a_killed_merge_step_is_rerun_from_the_start(runs, qcft, tmp_path):
    """The step's own folder: a model folder without done.json is not taken for a model."""
    shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    step = (tmp_path / "runs" / "tiny" / "merged").resolve()
    whole = (step / "model" / "model.safetensors").read_bytes()
    (step / "done.json").unlink()
    (step / "model" / "model.safetensors").write_bytes(whole[:1000])
    (step / "model.partial").mkdir()
    assert qcft("run", tmp_path / "tiny.yaml", "--runs", tmp_path / "runs", "-q")[0] == 0
    assert (step / "model" / "model.safetensors").read_bytes() == whole
    assert not (step / "model.partial").exists()


def test_a_stacked_phase_2_kept_all_of_phase_1(runs, tiny_model):
    """Phase 1 under phase 2 is the live adapter itself: logits equal, so kept is 1."""
    one = (runs / "stack" / "phase1").resolve() / "adapter"
    two = (runs / "stack" / "phase2").resolve() / "adapter"
    stack = load_stack(load_model(tiny_model, Model(name="tiny")), [one, two])
    live = load_stack(load_model(tiny_model, Model(name="tiny")), [one])
    for module in stack.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.0)
    assert torch.equal(logits(stack), logits(live))
    assert Watch().stop_code is None


@pytest.fixture(scope="module")
def base_model(tmp_path_factory, tokenizer_folder):
    """A base model: its EOS ends documents, and its tokenizer has no chat template."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, eos_token="<|endoftext|>")
    tokenizer.chat_template = None
    return make_llama(tmp_path_factory.mktemp("base"), tokenizer)


@pytest.fixture(scope="module")
def chatml_run(tmp_path_factory, base_model, color_data):
    """The base model trained with the built-in chat template until its answers end."""
    import qcft

    recipe = make_recipe(base_model, color_data)
    recipe["model"]["chat_template"] = "chatml"
    recipe["phases"] = recipe["phases"][:1]
    recipe["phases"][0]["train"] |= {"epochs": 12, "packing": False}
    folder = tmp_path_factory.mktemp("chatml")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    qcft.run(folder / "tiny.yaml", runs=folder / "runs")
    return folder / "runs"


def answered(model, tokenizer):
    """A greedy answer by transformers alone, as its own files say where to stop."""
    turns = [{"role": "user", "content": "what color is the cat number 3"}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    new = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    return tokenizer.decode(new)


def test_an_exported_chatml_model_stops(chatml_run, qcft, tmp_path, base_model):
    assert qcft("export", "tiny", "--runs", chatml_run, "--to", tmp_path / "model", "-q")[0] == 0
    model, tokenizer = of(tmp_path / "model"), AutoTokenizer.from_pretrained(tmp_path / "model")
    answer = answered(model, tokenizer)
    assert answer.endswith("<|im_end|>")
    assert answer.count("<|im_end|>") == 1
    end, old = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    assert model.generation_config.eos_token_id == [old, end]
    assert read_json(tmp_path / "model" / "config.json")["eos_token_id"] == tokenizer.eos_token_id == end
    assert read_json(base_model / "generation_config.json")["eos_token_id"] == old


def test_an_adapter_is_exported_with_the_template_and_eos_of_its_training(chatml_run, qcft, tmp_path, base_model):
    assert qcft("export", "tiny", "--runs", chatml_run, "--to", tmp_path / "adapter", "--adapter-only", "-q")[0] == 0
    for folder in (tmp_path / "adapter", (chatml_run / "tiny" / "phase1").resolve() / "adapter"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert "<|im_start|>" in tokenizer.chat_template
        assert tokenizer.eos_token == "<|im_end|>"
        model = PeftModel.from_pretrained(of(base_model), folder)
        model.generation_config = GenerationConfig.from_pretrained(folder)
        assert answered(model, tokenizer).endswith("<|im_end|>")


def test_a_model_whose_template_ends_turns_with_its_eos_is_exported_unmodified(runs, tiny_model, qcft, tmp_path):
    assert qcft("export", "tiny", "--runs", runs, "--to", tmp_path / "out", "-q")[0] == 0
    for name in ("generation_config.json", "config.json"):
        assert read_json(tmp_path / "out" / name) == read_json(tiny_model / name)
