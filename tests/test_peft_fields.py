"""Fields of PEFT's LoraConfig that a recipe passes on: trained in 4 bits, saved, merged as PEFT merges, or refused."""

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qcft import InputError, Interrupted, api
from qcft.cli.listings import layers_table
from qcft.deliveries import dial
from qcft.events import Progress, Watch
from qcft.layers import linear_modules
from qcft.models.adapters import add_lora, trained_numbers
from qcft.models.load import load_model
from qcft.models.merge import Target, merge_adapters
from qcft.models.switch import Switched, reads_weights
from qcft.recipe import Lora, Model, recipe_from
from qcft.recipe.peft import OWNED, REFUSED, Peft
from qcft.store import Store
from qcft.training.footprint import Pass, footprint

from .helpers.shapes import shape_of, tiny_meta
from .helpers.tiny import make_llama
from .helpers.training import TRAIN, adapter_of, same, train

IDS = torch.arange(3, 27).reshape(2, 12)
KINDS = {
    "dora": {"use_dora": True},
    "ranks": {"init_lora_weights": "gaussian", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"0\..*v_proj": 3}},
    "bias": {"lora_bias": True},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("biased")
    return make_llama(folder, tokenizer, layers=2, attention_bias=True, mlp_bias=True)


@pytest.fixture
def raw(raw_recipe, model):
    """Three phases of two steps: the second starts from the first merged, the third continues the second's adapter."""
    first, second = raw_recipe["phases"]
    second.update(replay=None, freeze="none")
    for phase in (first, second):
        phase["train"] = {**phase["train"], "steps": 2}
    return {
        **raw_recipe,
        "model": {"name": str(model)},
        "heldout": {"share": 0.2, "rows": 2},
        "answers": {"prompts": 0},
        "merge": {"refuse_below": None},
        "forgetting": None,
        "phases": [first, second, {**second, "name": "phase3", "start": "continue"}],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_is_trained_continued_and_merged_as_peft_merges(kind, raw, tmp_path):
    runs = tmp_path / "runs"
    done = api.run(recipe_from({**raw, "lora": {"r": 4, "alpha": 8, "peft": KINDS[kind]}}), runs=runs)
    parts = {stage: Store(runs).opened(one.step).folder for stage, one in done.stages.items()}
    before, after = (parts[phase] / "adapter" for phase in ("phase2", "phase3"))
    config = json.loads((after / "adapter_config.json").read_text())
    assert {key: config[key] for key in KINDS[kind]} == KINDS[kind]
    held = load_file(after / "adapter_model.safetensors")
    assert sum(one.numel() for one in held.values()) == done.stages["phase3"].metrics["trainable_parameters"]
    assert any("magnitude" in name for name in held) == (kind == "dora")
    earlier = load_file(before / "adapter_model.safetensors")
    assert all(not torch.equal(earlier[name], one) for name, one in held.items())  # all of it is trained, twice
    base = parts["merged"] / "model"
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), after)
    expected = live.merge_and_unload().state_dict()
    if kind != "ranks":
        with pytest.raises(InputError, match="cannot be scaled"):
            dial(done.name, None, runs, Watch())
    shown = layers_table(done.name, runs, "first:1", None, [], False, Watch())
    assert (shown["phase"], [bool(one["adapted"]) for one in shown["layers"]]) == ("phase3", [False, True])
    assert all((one["change"] is None) == (kind != "ranks") for one in shown["layers"])
    (tmp_path / "out").mkdir()
    merge_adapters(base, [after], tmp_path / "out", Watch(), Target(dtype="float32"))
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.allclose(weight, expected[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_counted_as_peft_makes_them(kind, model):
    lora = Lora(r=4, peft=KINDS[kind])
    plain = load_model(model, Model(name="tiny"), "none")
    modules = linear_modules(plain)
    counted = sum(trained_numbers(lora, module.name, module.shape) for module in modules)
    adapted = add_lora(plain, [module.name for module in modules], lora)
    assert counted == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_dora_takes_more_memory_than_plain_lora():
    tiny, rows = tiny_meta(), Pass((90, 60, 50), 80, by_rows=True)
    shape = shape_of(tiny)
    plain, dora = (footprint(tiny, dataclasses.replace(shape, lora=one), rows) for one in (
        Lora(), Lora(peft=KINDS["dora"])
    ))  # fmt: skip
    assert dora.activations > plain.activations
    assert dora.flops > plain.flops


def test_dora_resumes_to_the_bit(tiny_model, tmp_path):
    settings, lora = TRAIN.model_copy(update={"steps": 4}), Lora(r=4, peft=KINDS["dora"])
    train(tiny_model, tmp_path / "whole", settings=settings, lora=lora)
    watch = Watch(lambda event: watch.ask_to_stop(143) if isinstance(event, Progress) and event.done == 1 else None)
    with pytest.raises(Interrupted):
        train(tiny_model, tmp_path / "step", watch, settings=settings, lora=lora)
    assert train(tiny_model, tmp_path / "step", settings=settings, lora=lora)[0].resumed_from == 2
    assert same(adapter_of(tmp_path / "step"), adapter_of(tmp_path / "whole"))


def test_an_evaluated_dora_adapter_reads_unpacked_weights(tiny_model, tmp_path):
    """On CPUs with AVX512-BF16, bitsandbytes packs 4-bit weights in evaluation, which PEFT reads as if they were not:
    an adapter that changes nothing would change the logits by a sixth of their size."""
    adapted = add_lora(load_model(tiny_model, Model(name="tiny")), ["model.layers.0.mlp.down_proj"], Lora(
        r=4, peft=KINDS["dora"]
    ))  # fmt: skip
    adapted.save_pretrained(tmp_path / "adapter")
    assert reads_weights([tmp_path / "adapter"])
    switched = Switched(load_model(tiny_model, Model(name="tiny")), packed=False)
    with torch.no_grad():
        live = switched.use([tmp_path / "adapter"])(input_ids=IDS).logits
        bare = switched.use([])(input_ids=IDS).logits
    assert torch.allclose(live, bare, atol=0.05)


def test_every_field_of_loraconfig_is_passed_on_or_refused_by_name():
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    assert not set(Peft.model_fields) & (OWNED | REFUSED).keys()
    assert known == (set(Peft.model_fields) | OWNED.keys() | REFUSED.keys())


def test_defaults_of_peft_do_not_make_another_step(raw):
    plain, same_, dora = (recipe_from(raw, {"lora.peft": fields}) for fields in (
        {}, {"use_dora": False, "init_lora_weights": True}, {"use_dora": True}
    ))  # fmt: skip
    assert plain.lora.peft.given() is same_.lora.peft.given() is None
    assert dora.lora.peft.given() == {"use_dora": True}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora.peft": {"use_dora": True}, "phase2.start": "stacked"}, "cannot be part of a stack"),
        ({"lora.peft": {"lora_bias": True}, "phase2.start": "stacked"}, "cannot be part of a stack"),
        ({"lora.peft": {"use_dora": True}, "phase2.freeze": "most-changed:0.5"}, "how much such an adapter changed"),
        (
            {"lora.peft": {"use_dora": True}, "phase1": {"adapter": "x"}, "phase2.start": "continue"},
            "whose own config applies",
        ),
    ],
)
def test_what_such_an_adapter_cannot_do_is_refused_before_training(changes, says, raw):
    with pytest.raises(InputError, match=says) as error:
        recipe_from(raw, changes)
    assert error.value.hint
