"""Freezing that pays: attention row by row, stored states of the frozen layers, and what neither may change."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcft import Interrupted
from qcft.data.mix import mixed_order
from qcft.events import Note, Progress, Watch
from qcft.layers import adapted_modules
from qcft.models.adapters import add_lora
from qcft.models.load import load_model, load_tokenizer
from qcft.recipe import Lora, Model, parse_freeze
from qcft.steps.prefix import open_prefix
from qcft.store import Store
from qcft.store.states import INDEX, STATES, RowStates
from qcft.training.attention import attend_by_rows
from qcft.training.batches import make_batches
from qcft.training.prefix import fill_states, row_key
from qcft.training.sft import train_adapter
from qcft.training.trainer import Shortcuts

from .helpers.prefix import TRAIN, rows_of, set_to, train
from .helpers.tiny import make_llama


@pytest.fixture(scope="module")
def model5(tmp_path_factory, tokenizer):
    return make_llama(tmp_path_factory.mktemp("five"), tokenizer, layers=5)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_from_stored_states_training_is_the_same_to_the_bit(model5, tmp_path, packing, checkpointing):
    """bf16 on a CPU, three epochs in different packs, with replay."""
    settings = set_to(TRAIN, packing=packing, gradient_checkpointing=checkpointing)
    plain, adapter, none = train(
        model5, tmp_path / "plain", Store(tmp_path / "p"), set_to(settings, prefix_cache=False)
    )
    assert none is None
    losses, cached, prefix = train(model5, tmp_path / "cached", Store(tmp_path / "c"), settings)
    assert prefix is not None
    assert prefix.below == 2
    assert len(losses) > 10
    assert losses == plain
    assert adapter.keys() == cached.keys()
    assert all(torch.equal(adapter[k], cached[k]) for k in adapter)


def test_in_fp32_it_is_the_same_to_five_digits(model5, tmp_path, monkeypatch):
    """Where products of matrices differ in their last bits from one batch size to the next."""
    for place in ("models.load", "training.settings", "training.prefix"):
        monkeypatch.setattr(f"qcft.{place}.compute_dtype", lambda: torch.float32)
    settings = set_to(TRAIN, epochs=2)
    plain, _, _ = train(model5, tmp_path / "plain", Store(tmp_path / "p"), set_to(settings, prefix_cache=False))
    losses, _, prefix = train(model5, tmp_path / "cached", Store(tmp_path / "c"), settings)
    assert prefix.states.itemsize == 4
    assert losses == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_row_by_row_is_the_masked_attention(model5, tmp_path, packing):
    settings = set_to(TRAIN, packing=packing, prefix_cache=False, lr=1e-3)
    masked, _, _ = train(model5, tmp_path / "masked", Store(tmp_path / "s"), settings, by_rows=False)
    rowwise, _, _ = train(model5, tmp_path / "rows", Store(tmp_path / "s"), settings)
    assert rowwise == pytest.approx(masked, rel=5e-3)  # bf16 rounds differently


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_other_families_split_too(family, tmp_path, tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), num_hidden_layers=4, head_dim=16, **sizes)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    settings = set_to(TRAIN, epochs=2)
    off = set_to(settings, prefix_cache=False)
    plain, _, _ = train(tmp_path / "model", tmp_path / "plain", Store(tmp_path / "p"), off)
    losses, _, prefix = train(tmp_path / "model", tmp_path / "cached", Store(tmp_path / "c"), settings)
    assert prefix is not None
    assert losses == plain


def test_a_sliding_window_shorter_than_a_row_keeps_the_masked_attention(tmp_path, tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mistral", hidden_size=32, num_hidden_layers=2, vocab_size=64, sliding_window=16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert not attend_by_rows(model, 17)
    assert model.config._attn_implementation == "sdpa"
    assert attend_by_rows(model, 16)


def test_other_arms_share_the_rows(model5, tmp_path):
    """The second arm adds its replay rows and computes nothing else; its result does not depend on the first."""
    store, events = Store(tmp_path / "shared"), []
    train(model5, tmp_path / "a", store, extra=0)
    watch = Watch(events.append)
    losses, adapter, _ = train(model5, tmp_path / "b", store, extra=4, watch=watch)
    assert any("18 of 22 rows stored so far" in e.text for e in events if isinstance(e, Note))
    assert max(e.total for e in events if isinstance(e, Progress) and "caching" in e.label) == 4
    alone, same, _ = train(model5, tmp_path / "c", Store(tmp_path / "alone"), extra=4)
    assert losses == alone
    assert all(torch.equal(adapter[k], same[k]) for k in adapter)


def test_an_altered_or_cut_cache_is_found_and_rebuilt(model5, tmp_path):
    store = Store(tmp_path / "store")
    losses, _, prefix = train(model5, tmp_path / "a", store)
    place = prefix.states.folder
    data = bytearray((place / STATES).read_bytes())
    data[len(data) // 2] ^= 1
    (place / STATES).write_bytes(data[:-40])
    lines = (place / INDEX).read_text()
    (place / INDEX).write_text(lines[:-9])
    events = []
    again, _, _ = train(model5, tmp_path / "b", store, watch=Watch(events.append))
    assert again == losses
    remade = max(e.total for e in events if isinstance(e, Progress) and "caching" in e.label)
    assert remade == 2  # the flipped row and the last, which lost its end


def test_the_frozen_layers_and_the_embedding_are_gone_and_do_not_run(tmp_path, tokenizer):
    folder = make_llama(tmp_path / "untied", tokenizer, layers=4, tie_word_embeddings=False)
    model = load_model(folder, Model(name="tiny"))
    before = sum(p.numel() for p in model.parameters())
    kept = sum(p.numel() for layer in model.model.layers[2:] for p in layer.parameters())
    rows = rows_of(tokenizer)
    attend_by_rows(model, 96)
    prefix = open_prefix(model, 2, rows, 99, {"weights": "x"}, TRAIN, Store(tmp_path / "s"), Watch())
    after = sum(p.numel() for p in model.parameters())
    assert after == kept + model.lm_head.weight.numel() + model.model.norm.weight.numel() < before
    prefix.show(rows[:2])
    assert prefix.stored.current.shape == (1, sum(len(r.input_ids) for r in rows[:2]), 64)


def test_nothing_is_saved_or_recomputed_under_the_boundary(model5, tmp_path):
    """With checkpointing on, frozen layers run once a pass, those above twice; and the plain gradients are equal."""
    tokenizer = load_tokenizer(model5, Model(name="tiny"))
    rows = rows_of(tokenizer, 4)
    calls: dict[int, int] = {}
    saved: dict[int, int] = {}
    settings = set_to(TRAIN, steps=1, epochs=1, gradient_checkpointing=True, prefix_cache=False)
    batches = make_batches(rows, lambda epoch: mixed_order(4, 0, "0"), settings)
    model = load_model(model5, Model(name="tiny"))
    modules = adapted_modules(model, "all-linear", parse_freeze("first:2"), 0)
    adapted = add_lora(model, modules, Lora(r=4))
    attend_by_rows(model, 96)
    for i, layer in enumerate(model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, i=i: calls.update({i: calls.get(i, 0) + 1}))
    current = [-1]

    def pack(tensor):
        saved[current[0]] = saved.get(current[0], 0) + 1
        return tensor

    # A layer's end begins the next one: what is saved of its input may come before its own hooks (transformers 5.17).
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, i=i: current.__setitem__(0, i + 1))
    (tmp_path / "step").mkdir()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        shortcuts = Shortcuts(2, True)
        train_adapter(adapted, tokenizer, batches, settings, 0, tmp_path / "step", Watch(), "training", shortcuts)
    passes = len(batches.items)
    assert calls == {0: passes, 1: passes, 2: 2 * passes, 3: 2 * passes, 4: 2 * passes}
    assert saved.keys() & {-1, 0, 1} == set()
    assert saved[2] > 0


@pytest.mark.parametrize(
    ("change", "freeze", "says"),
    [
        ({"prefix_cache": True}, "none", "layer 0 carries an adapter"),
        ({"sft": {"neftune_noise_alpha": 5}}, "first:2", "NEFTune"),
    ],
)
def test_where_it_cannot_be_the_plain_path_says_so(model5, tmp_path, change, freeze, says):
    events = []
    settings = set_to(TRAIN, steps=1, **change)
    _, _, prefix = train(
        model5, tmp_path / "a", Store(tmp_path / "s"), settings, watch=Watch(events.append), freeze=freeze
    )
    assert prefix is None
    assert any(says in e.text for e in events if isinstance(e, Note))


def test_too_little_disk_is_reported_and_the_plain_path_used(model5, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    events = []
    _, _, prefix = train(model5, tmp_path / "a", Store(tmp_path / "s"), watch=Watch(events.append))
    assert prefix is None
    assert any("it needs" in e.text and e.level == "warning" for e in events if isinstance(e, Note))


def test_a_killed_fill_resumes(model5, tmp_path, tokenizer, monkeypatch):
    """Stopped in the middle, what is listed stays, and the rest is as if nothing had happened."""
    monkeypatch.setattr("qcft.training.prefix.PASS_TOKENS", 64)
    model = load_model(model5, Model(name="tiny"))
    attend_by_rows(model, 96)
    rows = rows_of(tokenizer)
    watch = Watch(lambda event: watch.ask_to_stop() if isinstance(event, Progress) and event.done >= 6 else None)
    (tmp_path / "s").mkdir()
    with pytest.raises(Exception, match="stopped"):
        fill_states(model, 2, rows, RowStates(tmp_path / "s", 64, 2), watch)
    with (tmp_path / "s" / STATES).open("ab") as stream:
        stream.write(b"half a row")
    there = RowStates(tmp_path / "s", 64, 2)
    assert 6 <= sum(there.has(row_key(row)) for row in rows) < len(rows)
    fill_states(model, 2, rows, there, Watch())
    (tmp_path / "w").mkdir()
    whole = RowStates(tmp_path / "w", 64, 2)
    fill_states(model, 2, rows, whole, Watch())
    assert all(np.array_equal(there.read(row_key(row)), whole.read(row_key(row))) for row in rows)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), max_size=6), st.sampled_from([2, 4]))
def test_rows_are_read_as_they_were_stored(tmp_path_factory, groups, itemsize):
    folder = tmp_path_factory.mktemp("states")
    stored = {}
    for i, lengths in enumerate(groups):
        states = RowStates(folder, 5, itemsize)
        rows = [
            (f"{i}-{j}", np.arange(5 * n, dtype=f"int{8 * itemsize}").reshape(n, 5) + i + j)
            for j, n in enumerate(lengths)
        ]
        states.add(rows)
        stored.update(rows)
    states = RowStates(folder, 5, itemsize)
    assert states.missing([*stored, "other"]) == ["other"]
    assert all(np.array_equal(states.read(key), value) for key, value in stored.items())


def test_gradients_are_the_plain_ones_though_the_backward_pass_ends_earlier(model5):
    """With TRL's hook on the embeddings it walks to the bottom; without, it ends at layer 2. Equal to the bit."""
    tokenizer = load_tokenizer(model5, Model(name="tiny"))
    model = load_model(model5, Model(name="tiny"))
    torch.manual_seed(0)
    adapted = add_lora(model, adapted_modules(model, "all-linear", parse_freeze("first:2"), 0), Lora(r=4))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.train()  # in evaluation bitsandbytes takes other kernels where no gradient is needed
    ids = torch.tensor([rows_of(tokenizer, 1)[0].input_ids])
    seen = {}
    for hooked in (True, False):
        if hooked:
            adapted.enable_input_require_grads()
        else:
            adapted.disable_input_require_grads()
        adapted.zero_grad()
        adapted(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        seen[hooked] = {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}
    assert len(seen[True]) == 2 * 3 * 7
    assert seen[True].keys() == seen[False].keys()
    assert all(torch.equal(seen[True][name], seen[False][name]) for name in seen[True])


def test_a_training_from_stored_states_resumes_after_a_stop(model5, tmp_path):
    losses, whole, _ = train(model5, tmp_path / "whole", Store(tmp_path / "s"))
    watch = Watch(
        lambda event: (
            watch.ask_to_stop()
            if isinstance(event, Progress) and event.label == "training" and event.done == 7
            else None
        )
    )
    with pytest.raises(Interrupted):
        train(model5, tmp_path / "step", Store(tmp_path / "s"), watch=watch)
    again, adapter, prefix = train(model5, tmp_path / "step", Store(tmp_path / "s"))
    assert prefix is not None
    assert again == losses
    assert all(torch.equal(adapter[k], whole[k]) for k in whole)


def test_a_family_that_cannot_be_split_trains_the_plain_way_and_says_so(tmp_path, tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=3, vocab_size=len(tokenizer), head_dim=16, **sizes)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    events = []
    settings, watch = set_to(TRAIN, steps=2, epochs=1), Watch(events.append)
    losses, _, prefix = train(
        tmp_path / "model", tmp_path / "a", Store(tmp_path / "s"), settings, watch=watch, freeze="first:1"
    )
    assert (len(losses), prefix) == (2, None)
    assert any("does not know how to split gemma3_text" in e.text for e in events if isinstance(e, Note))
