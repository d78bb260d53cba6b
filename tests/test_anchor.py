"""The terms that hold a phase to the model it started from: an anchor on new rows, replay rows that are distilled."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qcft import QcftError
from qcft.data.encode import IGNORED
from qcft.data.mix import mixed_order
from qcft.events import Watch
from qcft.layers import adapted_modules, lowest_adapted
from qcft.models.adapters import add_lora, add_lora_over, load_stack
from qcft.models.load import load_model, load_tokenizer
from qcft.recipe import Anchor, Lora, Model, Train, parse_freeze
from qcft.steps.prefix import open_prefix
from qcft.store import Store
from qcft.training.attention import attend_by_rows
from qcft.training.batches import make_batches
from qcft.training.divergence import divergence
from qcft.training.head import OwnHead
from qcft.training.reference import Terms
from qcft.training.sft import train_adapter
from qcft.training.trainer import Shortcuts

from .helpers.families import make_family
from .helpers.prefix import rows_of
from .helpers.tiny import make_llama

# One step of plain gradient descent: what an adapter loses in it is its gradient.
STEP = Train(
    lr=1.0, batch=9, micro_batch=9, steps=1, max_length=96, optimizer="sgd", scheduler="constant", warmup=0,
    prefix_cache=False, sft={"max_grad_norm": 0},
)  # fmt: skip
MASKED, KL = Terms(Anchor(weight=0.7)), Terms(Anchor(kind="kl", weight=0.3))
DISTIL, BOTH = Terms(distil=True), Terms(Anchor(weight=0.7), distil=True)
EVERY = {"target-masked": MASKED, "kl": KL, "distil": DISTIL, "both": BOTH}


@pytest.fixture(scope="module")
def model4(tmp_path_factory, tokenizer):
    return make_llama(tmp_path_factory.mktemp("four"), tokenizer, layers=4)


@pytest.fixture
def in_fp32(monkeypatch):
    for place in ("models.load", "training.settings", "training.prefix"):
        monkeypatch.setattr(f"qcft.{place}.compute_dtype", lambda: torch.float32)


def mixed(tokenizer, new=6, replay=3):
    """New rows, and replay rows of other lengths."""
    from dataclasses import replace

    kept = [replace(row, replay=True) for row in rows_of(tokenizer, replay, seed=5)]
    return [*rows_of(tokenizer, new), *kept]


def adapted_on(folder, freeze="first:2", moved=True, dropout=0.0):
    """The model with fresh adapters, which `moved` has away from zero."""
    model = load_model(folder, Model(name="tiny"))
    modules = adapted_modules(model, "all-linear", parse_freeze(freeze), 0)
    torch.manual_seed(0)
    adapted = add_lora(model, modules, Lora(r=4, dropout=dropout))
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            p.data = p.data.float()
            if moved and "lora_B" in name:
                torch.nn.init.normal_(p, std=0.05)
    return model, adapted, lowest_adapted(model, modules)


def train(
    folder,
    place,
    terms,
    settings=STEP,
    by_rows=True,
    shares=True,
    store=None,
    watch=None,
    rows=None,
    fused=True,
    **given,
):
    """A training from adapters that have moved; its adapter before and after, its log, and its result."""
    tokenizer = load_tokenizer(folder, Model(name="tiny"))
    rows = rows or mixed(tokenizer)
    model, adapted, below = given.pop("made", None) or adapted_on(folder, **given)
    before = {n: p.detach().clone() for n, p in adapted.named_parameters() if p.requires_grad}
    count = sum(row.replay for row in rows)
    batches = make_batches(rows, lambda epoch: mixed_order(len(rows) - count, count, f"0:{epoch}"), settings)
    rowwise = by_rows and attend_by_rows(model, 96)
    prefix = store and open_prefix(model, below, rows, batches.rows, {"weights": "tiny"}, settings, store, Watch())
    shortcuts = Shortcuts(below, rowwise, prefix, fused, below if shares and not prefix else 0)
    place.mkdir(parents=True, exist_ok=True)
    trained = train_adapter(
        adapted, tokenizer, batches, settings, 0, place, watch or Watch(), "training", shortcuts, carried=True,
        terms=terms,
    )  # fmt: skip
    log = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    saved = load_file(place / "adapter" / "adapter_model.safetensors")
    after = {name: saved[name.replace(".default", "")] for name in before}
    return before, after, log, trained


def raw_logits(model, adapted, rows, off):
    """What the model itself says at each answer token of each row, run alone, by PEFT's own switch: (tokens, words)."""
    from contextlib import nullcontext

    adapted.train()
    found = []
    for row in rows:
        with adapted.disable_adapter() if off else nullcontext():
            logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits[0, :-1].float()
        found.append(logits[torch.tensor(row.labels[1:]) != IGNORED])
    return found


def by_hand(terms, rows, p_logits, q_logits):
    """The loss and its terms, from raw logits, as tensors or as arrays."""
    xp = torch if isinstance(p_logits[0], torch.Tensor) else np

    def log_softmax(z):
        top = z.max(-1)[0][:, None] if xp is torch else z.max(-1)[:, None]
        return z - top - xp.log(xp.exp(z - top).sum(-1))[:, None]

    sums = {"answer": 0.0, "new": 0.0, "anchor": 0.0, "distil": 0.0}
    counts = dict.fromkeys(sums, 0)
    for row, p, q in zip(rows, p_logits, q_logits, strict=True):
        right = [label for label in row.labels[1:] if label != IGNORED]
        n = len(right)
        distilled = row.replay and terms.distil
        log_p, log_q = log_softmax(p), log_softmax(q)
        nll = -log_p[range(n), right].sum()
        masked = not row.replay and terms.anchor is not None and terms.anchor.kind == "target-masked"
        if masked:  # p and q without the right word
            keep = np.ones(p.shape, bool)
            keep[range(n), right] = False
            log_p, log_q = (log_softmax(z[keep].reshape(n, -1)) for z in (p, q))
        kl = (xp.exp(log_q) * (log_q - log_p)).sum()
        for name, value, bears in (
            ("answer", nll, not distilled), ("new", nll, not row.replay),
            ("anchor", kl, not row.replay and terms.anchor), ("distil", kl, distilled),
        ):  # fmt: skip
            if bears:
                sums[name], counts[name] = sums[name] + value, counts[name] + n
    weight = terms.anchor.strength if terms.anchor else 0.0
    total = sum(row.answer_tokens for row in rows)
    return (sums["answer"] + weight * sums["anchor"] + sums["distil"]) / total, sums, counts


@pytest.mark.parametrize("terms", EVERY.values(), ids=EVERY)
def test_loss_and_gradient_are_those_of_the_formula(model4, tokenizer, tmp_path, in_fp32, terms):
    """In NF4 with fp32 compute: values from raw logits by numpy, gradients by autograd on the formula."""
    rows = mixed(tokenizer)
    model, adapted, _ = adapted_on(model4)
    with torch.no_grad():
        q_logits = raw_logits(model, adapted, rows, off=True)
    p_logits = raw_logits(model, adapted, rows, off=False)
    arrays = [[z.detach().double().numpy() for z in some] for some in (p_logits, q_logits)]
    wanted, sums, counts = by_hand(terms, rows, *arrays)
    before, after, (entry,), trained = train(model4, tmp_path / "step", terms)
    assert entry["objective"] == pytest.approx(wanted, rel=1e-5)
    for name, key in {"loss": "answer", "new_loss": "new", "anchor_kl": "anchor", "distil_kl": "distil"}.items():
        assert entry[name] == (pytest.approx(sums[key] / counts[key], rel=1e-4) if counts[key] else None), name
    assert trained.terms == {name: entry[name] for name in ("objective", "new_loss", "anchor_kl", "distil_kl")}
    assert sums["anchor"] + sums["distil"] > 1
    by_hand(terms, rows, p_logits, q_logits)[0].backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert gradients.keys() == before.keys()
    for name, gradient in gradients.items():
        assert (before[name] - after[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def gradients(result):
    before, after, _, _ = result
    return {name: before[name] - after[name] for name in before}


def logged(result):
    """The loss of the first step, and its terms."""
    names = ("objective", "loss", "new_loss", "anchor_kl", "distil_kl")
    return {name: result[2][0][name] for name in names if result[2][0][name] is not None}


def apart(a, b):
    """How far the gradients of two trainings are from each other, of their length."""
    a, b = (torch.cat([g.flatten() for g in gradients(one).values()]) for one in (a, b))
    return float((a - b).norm() / b.norm())


def same(a, b):
    """To the bit: adapters and what was logged of the loss."""
    losses = [[{k: v for k, v in e.items() if "loss" in k or k[-2:] == "kl"} for e in one[2]] for one in (a, b)]
    return losses[0] == losses[1] and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


ALONE = STEP.model_copy(update={"packing": False, "micro_batch": 1})
PADDED = STEP.model_copy(update={"packing": False})


@pytest.mark.parametrize("terms", [BOTH, KL], ids=["both", "kl"])
def test_packed_padded_and_single_rows_give_the_same_adapter(model4, tmp_path, in_fp32, terms):
    alone = train(model4, tmp_path / "alone", terms, ALONE, by_rows=False)
    ways = {
        "packed": train(model4, tmp_path / "packed", terms),
        "masked": train(model4, tmp_path / "masked", terms, by_rows=False),
        "side by side": train(model4, tmp_path / "rows", terms, PADDED),
        "padded": train(model4, tmp_path / "padded", terms, PADDED, by_rows=False),
    }
    for name, one in ways.items():
        assert apart(one, alone) < 1e-5, name
        assert logged(one) == pytest.approx(logged(alone), rel=1e-5), name


@pytest.mark.parametrize("packing", [True, False])
def test_from_stored_and_from_shared_states_it_is_the_same_to_the_bit(model4, tmp_path, packing):
    """In bf16, three steps: the frozen layers run twice, once for both models, and not at all."""
    settings = STEP.model_copy(update={"packing": packing, "batch": 3, "micro_batch": 3, "steps": 3, "lr": 0.1})
    twice = train(model4, tmp_path / "twice", BOTH, settings, shares=False)
    once = train(model4, tmp_path / "once", BOTH, settings)
    cached = settings.model_copy(update={"prefix_cache": True})
    stored = train(model4, tmp_path / "stored", BOTH, cached, store=Store(tmp_path / "store"))
    assert len(twice[2]) == 3
    assert same(once, twice)
    assert same(stored, twice)


def test_shared_states_save_a_pass_of_the_frozen_layers(model4, tmp_path):
    ran = {}
    for shares in (True, False):
        made = adapted_on(model4)
        layers, seen = made[0].model.layers, []
        for i, layer in enumerate(layers):
            layer.register_forward_hook(lambda *_, i=i, seen=seen: seen.append(i))
        train(model4, tmp_path / str(shares), BOTH, shares=shares, made=made)
        assert list(layers) == list(made[0].model.layers), "every layer is back in its place"
        ran[shares] = [seen.count(i) for i in range(4)]
    packs = ran[True][0]
    assert ran == {True: [packs, packs, 2 * packs, 2 * packs], False: [2 * packs] * 4}


def test_recomputed_activations_change_nothing(model4, tmp_path, in_fp32):
    settings = STEP.model_copy(update={"gradient_checkpointing": True})
    recomputed = train(model4, tmp_path / "one", BOTH, settings)
    assert apart(recomputed, train(model4, tmp_path / "two", BOTH, shares=False)) < 1e-5


@pytest.mark.parametrize("packing", [True, False])
def test_passes_that_do_not_fit_are_halved_and_counted_once(model4, tmp_path, in_fp32, packing):
    settings = STEP.model_copy(update={"packing": packing, "batch": 3, "micro_batch": 3})
    whole = train(model4, tmp_path / "whole", BOTH, settings)
    made, seen = adapted_on(model4), []

    def full(module, arguments):
        seen.append(arguments[0].numel())
        if len(seen) > 1 and seen[-1] > max(seen[0] // 2, 1) and len(seen) < 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    made[0].get_input_embeddings().register_forward_pre_hook(full)
    events = []
    halved = train(model4, tmp_path / "halved", BOTH, settings, made=made, watch=Watch(events.append))
    assert any("are halved" in getattr(event, "text", "") for event in events)
    assert apart(halved, whole) < 1e-5
    assert logged(halved) == pytest.approx(logged(whole), rel=1e-5)


def test_weight_0_only_measures(model4, tmp_path):
    """To the bit what is trained without it, dropout and all."""
    settings = STEP.model_copy(update={"steps": 3, "batch": 3, "optimizer": "adamw_torch", "lr": 1e-2})
    off = train(model4, tmp_path / "off", Terms(), settings, dropout=0.1)
    measured = train(model4, tmp_path / "zero", Terms(Anchor(weight=0)), settings, dropout=0.1)
    assert off[3].terms is None
    assert "objective" not in off[2][0]
    assert all(torch.equal(off[1][name], measured[1][name]) for name in off[1])
    assert [e["loss"] for e in off[2]] == pytest.approx([e["loss"] for e in measured[2]], rel=1e-6)
    assert [e["objective"] for e in measured[2]] == [e["loss"] for e in off[2]]
    assert all(e["anchor_kl"] > 0 for e in measured[2])


def saved_adapter(folder, place, seed):
    """An adapter as a phase leaves it."""
    from qcft.models.adapters import save_trained

    _, adapted, _ = adapted_on(folder)
    for p in adapted.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.02 + 0.01 * seed)
    save_trained(adapted, place)
    return place


def started(folder, tmp_path, start):
    """A model as a phase of each start finds it, with the adapter that it trains."""
    if start == "base":
        return adapted_on(folder, moved=False)
    model = load_model(folder, Model(name="tiny"))
    modules = adapted_modules(model, "all-linear", parse_freeze("first:2"), 0)
    first, second = (saved_adapter(folder, tmp_path / f"adapter{i}", i) for i in range(2))
    if start == "stacked":
        return model, add_lora_over(model, [first, second], modules, Lora(r=4, dropout=0.1)), 2
    return model, load_stack(model, [first, second], modules, copied=True), 2


@pytest.mark.parametrize("start", ["base", "stacked", "continue"])
def test_at_the_first_step_nothing_has_moved(model4, tokenizer, tmp_path, start):
    """The reference is the model as the phase finds it: the divergence is exactly 0, and later it is not. `base` is
    also `merged`, whose weights are another model's."""
    settings = STEP.model_copy(update={"steps": 3, "batch": 3, "optimizer": "adamw_torch", "lr": 1e-2})
    shares = start != "continue"
    made = started(model4, tmp_path, start)
    trainable = {name for name, p in made[1].named_parameters() if p.requires_grad}
    before, after, log, _ = train(model4, tmp_path / "step", BOTH, settings, made=made, shares=shares)
    assert {name for name, p in made[1].named_parameters() if p.requires_grad} == trainable
    assert all(".default." in name for name in trainable)
    first = next(e for e in log if e["anchor_kl"] is not None)
    assert first["step"] == 1
    assert log[0]["anchor_kl"] == 0.0
    assert log[0]["distil_kl"] in {0.0, None}
    assert log[-1]["anchor_kl"] > 0
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_copy_of_a_continued_adapter_is_unmodified(model4, tmp_path):
    settings = STEP.model_copy(update={"steps": 2, "batch": 3, "optimizer": "adamw_torch", "lr": 1e-2})
    made = started(model4, tmp_path, "continue")
    came = load_file(tmp_path / "adapter1" / "adapter_model.safetensors")
    train(model4, tmp_path / "step", MASKED, settings, made=made, shares=False)
    copies = {name.replace(".start", ""): p for name, p in made[1].named_parameters() if ".start." in name}
    assert copies.keys() == came.keys()
    assert all(torch.equal(copies[name], came[name]) and not copies[name].requires_grad for name in came)
    left = load_file(tmp_path / "step" / "adapter" / "adapter_model.safetensors")
    assert left.keys() == came.keys(), "the copy is not saved"


def test_a_stopped_training_resumes_to_the_same_adapter(model4, tmp_path):
    from qcft import Interrupted
    from qcft.events import Progress

    settings = STEP.model_copy(
        update={"steps": 4, "batch": 3, "optimizer": "adamw_torch", "lr": 1e-2, "checkpoint_steps": 2}
    )
    whole = train(model4, tmp_path / "whole", BOTH, settings, dropout=0.1)
    watch = Watch(lambda event: watch.ask_to_stop() if isinstance(event, Progress) and event.done == 2 else None)
    with pytest.raises(Interrupted):
        train(model4, tmp_path / "cut", BOTH, settings, dropout=0.1, watch=watch)
    resumed = train(model4, tmp_path / "cut", BOTH, settings, dropout=0.1)
    assert resumed[3].resumed_from > 0
    assert same(resumed, whole)
    assert resumed[3].terms == whole[3].terms


HEADS = ["gemma2", "granite", "cohere", "falcon_h1", "gemma3_wrapper"]


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_what_the_model_itself_calls_logits(name, tmp_path):
    """Capped, scaled, behind a wrapper, by a factor that its layers hold."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kind = AutoModelForImageTextToText if "wrapper" in name else AutoModelForCausalLM
    model = kind.from_pretrained(make_family(name, tmp_path), dtype=torch.float32)
    layers, found = model.base_model, []
    layers.register_forward_hook(
        lambda module, given, output: found.append(OwnHead(model, output)(output.last_hidden_state[0, 3:9]))
    )
    with torch.no_grad():
        own = model(input_ids=torch.arange(10, 30)[None], use_cache=False).logits[0, 3:9]
    assert len(found) == 1
    assert torch.equal(found[0], own)
    assert model.base_model is layers


def test_a_head_that_is_not_over_its_layers_is_refused(tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make_family("opt", tmp_path))
    with torch.no_grad():
        output = model.base_model(input_ids=torch.arange(10, 30)[None], use_cache=False)
        with pytest.raises(QcftError, match="logits of opt cannot be computed"):
            OwnHead(model, output)(output.last_hidden_state[0])


@pytest.mark.parametrize(("family", "fused"), [("gemma2", True), ("gemma2", False), ("llama", False)])
def test_other_heads_train_by_the_formula_too(family, fused, tokenizer, tmp_path, in_fp32):
    """Capped logits; a loss that is taken from the model's own logits."""
    folder = make_family(family, tmp_path / "model")
    tokens = load_tokenizer(folder, Model(name="tiny"))
    rows = mixed(tokens)
    model, adapted, _ = adapted_on(folder)
    with torch.no_grad():
        q_logits, p_logits = (raw_logits(model, adapted, rows, off) for off in (True, False))
    arrays = [[z.double().numpy() for z in some] for some in (p_logits, q_logits)]
    wanted, sums, counts = by_hand(BOTH, rows, *arrays)
    result = train(folder, tmp_path / "step", BOTH, ALONE, by_rows=False, shares=False, fused=fused, rows=rows)
    entry = result[2][0]
    assert entry["objective"] == pytest.approx(wanted, rel=1e-4)
    assert entry["anchor_kl"] == pytest.approx(sums["anchor"] / counts["anchor"], rel=1e-3)
    assert entry["distil_kl"] == pytest.approx(sums["distil"] / counts["distil"], rel=1e-3)


def test_in_fp16_small_divergences_have_their_gradient():
    """Differences of probabilities are far below what fp16 holds: against float64, by autograd on the formula."""
    torch.manual_seed(0)
    weight, reference = torch.randn(5000, 32) * 0.2, torch.randn(40, 32)
    student = (reference + 0.01 * torch.randn(40, 32)).half().requires_grad_()
    weight, reference, targets = weight.half(), reference.half(), torch.arange(40)
    masked = targets % 2 == 0
    kl, nll = divergence(lambda states: states @ weight.t(), student, reference, targets, masked, len(weight))
    (2048 * kl.sum()).backward()  # a scaled loss
    exact = student.detach().double().requires_grad_()
    z = [states @ weight.double().t() for states in (exact, reference.double())]
    keep = ~(masked[:, None] & (torch.arange(5000) == targets[:, None]))
    p, q = (one.masked_fill(~keep, -1e9).log_softmax(-1) for one in z)
    wanted = (q.exp() * (q - p)).sum(-1)
    wanted.sum().backward()
    assert torch.allclose(nll.double(), -z[0].log_softmax(-1)[range(40), targets], atol=1e-2)
    assert float(kl.sum()) == pytest.approx(float(wanted.sum()), rel=0.05)
    assert (student.grad.double() / 2048 - exact.grad).norm() < 0.05 * exact.grad.norm()
