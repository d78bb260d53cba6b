"""What weights and passes take, against arithmetic by hand and against what is really allocated."""

import copy

import pytest
import torch
from packaging.version import Version
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, MistralConfig

from qcft.models.size import nf4_bytes, weight_bytes
from qcft.recipe import Model
from qcft.training import footprint as room
from qcft.training.footprint import Pass, SecondPass, footprint

from .helpers.shapes import on_meta, shape_of, tiny_meta

MISTRAL_7B = MistralConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=32000, tie_word_embeddings=False,
)  # fmt: skip
LLAMA_3_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize("config", [MISTRAL_7B, LLAMA_3_8B], ids=["Mistral-7B", "Llama-3-8B"])
def test_weights_of_known_models_by_hand(config):
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336  # q o, k v, gate up down
    found = weight_bytes(on_meta(config), "nf4")
    assert found.packed == 32 * layer // 2
    # 8 bits for each 64 weights, 32 for each 16,384; two tables and an offset for each of 7 matrices a layer.
    assert found.constants == 32 * (layer // 64 + 4 * layer // 16384 + 7 * 4 * 273)
    assert found.embeddings == 2 * 2 * config.vocab_size * 4096
    assert found.other == 2 * 65 * 4096  # norms
    assert found.linear == 0
    plain = weight_bytes(on_meta(config), "none")
    assert plain.total == 2 * sum(p.numel() for p in on_meta(config).parameters())


def held_by(tensor) -> int:
    return tensor.numel() * tensor.element_size()


def test_weights_are_what_bitsandbytes_holds_to_the_byte(tiny_model):
    import bitsandbytes as bnb

    from qcft.models.load import load_model

    loaded = load_model(tiny_model, Model(name=str(tiny_model)))
    found = weight_bytes(on_meta(AutoConfig.from_pretrained(tiny_model)), "nf4")
    packed = constants = 0
    for module in loaded.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            packed += held_by(module.weight)
            own = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
            constants += sum(map(held_by, own))
    others = {p.data_ptr(): held_by(p) for p in loaded.parameters() if not isinstance(p, bnb.nn.Params4bit)}
    assert (found.packed, found.constants) == (packed, constants)
    assert found.embeddings + found.other == sum(others.values())


@pytest.mark.parametrize("count", [64, 65, 64 * 256, 64 * 256 + 1, 3 * 5 * 7 * 64])
def test_constants_of_any_matrix(count):
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(torch.randn(count), quant_type="nf4", compress_statistics=True)
    own = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    assert nf4_bytes(count) == (held_by(packed), sum(map(held_by, own)))


ROWS = Pass((90, 60, 50), 80, by_rows=True)


@pytest.mark.parametrize("freeze", ["none", "first:2", "every:2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_layer_of_each_kind_gives_what_all_take(freeze, checkpointing):
    model = tiny_meta()
    shape = shape_of(model, freeze, checkpointing)
    whole = room.run_layers(model, shape, ROWS, list(range(6)))
    found = footprint(model, shape, ROWS)
    assert found.activations == pytest.approx(whole.activations, rel=0.02)
    assert found.flops == whole.flops
    assert found.moved == pytest.approx(whole.moved, rel=0.02)


@pytest.mark.parametrize("shared", [4, 2, 1])
def test_attention_is_counted_by_its_query_heads(shared):
    """As PyTorch counts it where it can, which from 2.12 on is with keys and values shared by heads, too."""
    from torch.utils.flop_counter import sdpa_flop_count

    shapes = (2, 4, 10, 16), (2, shared, 20, 16), (2, shared, 20, 8)
    assert room.attention_flops(*shapes) == 2 * 2 * 4 * 10 * 20 * (16 + 8)
    if shared == 4 or Version(torch.__version__) >= Version("2.12"):
        assert room.attention_flops(*shapes) == sdpa_flop_count(*shapes)


def test_a_counter_that_knows_no_shared_heads_is_not_used(monkeypatch):
    """As torch 2.11's, which raises."""
    from torch.utils import flop_counter

    def refuses(*shapes, **options):
        raise AssertionError("query/key/value shapes are incompatible")

    model = tiny_meta()
    before = footprint(model, shape_of(model), ROWS)
    for packet in list(flop_counter.flop_registry):
        if "scaled_dot_product" in str(packet):
            monkeypatch.setitem(flop_counter.flop_registry, packet, refuses)
    monkeypatch.setattr(flop_counter, "sdpa_flop_count", refuses)
    assert footprint(model, shape_of(model), ROWS).flops == before.flops > 0


def test_peft_casts_what_goes_into_adapters_on_a_cpu_only():
    """An 8B on a card, activations kept: each adapter's input is not held a second time, in fp32."""
    model = on_meta(LLAMA_3_8B)
    one = Pass((512,), 1)  # whose logits, computed in different ways, take little room
    shapes = [shape_of(model, device=device) for device in ("cpu", "cuda")]
    on_cpu, on_cuda = (footprint(model, shape, one).activations for shape in shapes)
    assert 1.2 < on_cpu / on_cuda < 1.35
    assert not torch.is_autocast_enabled("cuda")


def test_what_is_frozen_recomputed_or_cut_takes_less():
    model = tiny_meta()
    plain = footprint(model, shape_of(model), ROWS)
    frozen = footprint(model, shape_of(model, "first:4"), ROWS)
    recomputed = footprint(model, shape_of(model, checkpointing=True), ROWS)
    cut = footprint(model, shape_of(model, "first:4", cut=True), ROWS)
    assert frozen.activations < plain.activations
    assert recomputed.activations < plain.activations
    assert recomputed.flops > plain.flops > frozen.flops > cut.flops


def test_a_second_pass_is_a_forward_pass_and_another_head():
    """Of the layers above the frozen ones where those are shared, of all where they are not."""
    model = tiny_meta()

    def flops(second=None, **options):
        return footprint(model, shape_of(model, "first:4", second=second, **options), ROWS).flops

    plain, shared, twice = flops(), flops(SecondPass(shared=True)), flops(SecondPass())
    assert plain < shared < twice < flops(SecondPass(copied=True))
    assert twice - shared == pytest.approx(plain - flops(cut=True))  # the frozen layers, forward


def test_the_model_stays_as_it_is():
    model = tiny_meta()
    before = [(name, p.shape, p.device) for name, p in model.named_parameters()]
    attention = model.config._attn_implementation
    footprint(model, shape_of(model), ROWS)
    assert [(name, p.shape, p.device) for name, p in model.named_parameters()] == before
    assert model.config._attn_implementation == attention


def test_activations_are_what_autograd_keeps():
    """Counted on shapes, and on the same model with data, by the storages that its backward pass holds on to."""
    from qcft.models.adapters import add_lora, keep_adapters_in_fp32

    meta = tiny_meta()
    shape = shape_of(meta, quantize="none")
    real = AutoModelForCausalLM.from_config(copy.deepcopy(meta.config), dtype=torch.bfloat16)
    adapted = add_lora(real, list(shape.modules), shape.lora)
    keep_adapters_in_fp32(adapted)
    own = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.zeros(1, 200, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        states = real.base_model(input_ids=ids, position_ids=torch.arange(200)[None], use_cache=False)
    held = sum(kept.values())
    del states
    counted = footprint(meta, shape, Pass((200,), 1))
    # The pass also makes what it does not keep, and gradients of what it keeps; never as much again.
    assert held < counted.activations < 2 * held
