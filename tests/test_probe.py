"""The live probe: it sees the model as it is, changes nothing that is trained, and decides the same after a kill."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qcft import Interrupted, QcftError
from qcft.api import run as run_recipe
from qcft.data.encode import Encoder
from qcft.data.mix import mixed_order
from qcft.data.rows import Message, Row
from qcft.events import Note, Progress, Watch
from qcft.layers import adapted_modules, lowest_adapted
from qcft.measure.score import score_rows
from qcft.measure.stats import mean_nll
from qcft.models.adapters import add_lora, load_adapter
from qcft.models.load import load_model, load_tokenizer
from qcft.plan import make_plan
from qcft.prepare.digests import Digests
from qcft.recipe import Forgetting, Lora, Model, Train, parse_freeze, recipe_from
from qcft.steps.prefix import open_prefix
from qcft.store import Store
from qcft.training.attention import attend_by_rows
from qcft.training.batches import make_batches
from qcft.training.probe import COST, FEWEST_PROBES, Probing, lay_out
from qcft.training.sft import train_adapter
from qcft.training.trainer import Shortcuts
from tests.helpers.training import adapter_of, log_of, rows_of, same

TRAIN = Train(lr=2e-2, batch=4, epochs=2, max_length=64, checkpoint_steps=2)
NEVER = Probing((), 1, None, None)


def english(tokenizer, count=5):
    made = [
        Row(
            (Message("user", f"the cat number {i}"),),
            (Message("assistant", f"{'four number animal what eats color ' * 3}{i}"),),
        )
        for i in range(count)
    ]
    return Encoder(tokenizer).encode_all(made).encoded


def train(model_folder, folder, probing=NEVER, watch=None, settings=TRAIN, prefix=None, by_rows=True):
    """A training with dropout and a frozen layer, probed unless `probing` has no rows."""
    tokenizer = load_tokenizer(model_folder, Model(name="tiny"))
    rows = rows_of(tokenizer)
    probing = replace(probing, rows=english(tokenizer)) if probing is not NEVER else None
    batches = make_batches(rows, lambda epoch: mixed_order(len(rows), 0, f"0:{epoch}"), settings)
    model = load_model(model_folder, Model(name="tiny"))
    torch.manual_seed(0)
    modules = adapted_modules(model, "all-linear", parse_freeze("first:1"), 0)
    adapted = add_lora(model, modules, Lora(r=4, dropout=0.1))
    below = lowest_adapted(model, modules)
    by_rows = by_rows and attend_by_rows(model, 64)
    watch = watch or Watch()
    stored = None
    if prefix:
        seen = [*rows, *(probing.rows if probing else ())]
        wanted = settings.model_copy(update={"prefix_cache": True})
        stored = open_prefix(model, below, seen, batches.rows, {}, wanted, Store(prefix), watch)
        assert stored is not None
    folder.mkdir(exist_ok=True)
    shortcuts = Shortcuts(below, by_rows, stored)
    trained = train_adapter(adapted, tokenizer, batches, settings, 0, folder, watch, "training", shortcuts, probing)
    return trained, adapted


@pytest.fixture(scope="module")
def plain(tiny_model, tmp_path_factory):
    """The adapter of a training that nobody looked at."""
    folder = tmp_path_factory.mktemp("plain") / "step"
    train(tiny_model, folder)
    return folder


@pytest.fixture(scope="module")
def probed(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probed") / "step"
    return folder, train(tiny_model, folder, Probing((), 2, None, None))[0]


def test_a_probed_training_has_the_same_adapter_to_the_bit(plain, probed):
    folder, trained = probed
    assert len(trained.forgetting["probes"]) == 1 + 12 // 2
    assert same(adapter_of(folder), adapter_of(plain))
    losses = [[entry["loss"] for entry in log_of(one)] for one in (folder, plain)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("prefix", "by_rows"), [(True, True), (True, False), (False, False)])
def test_it_is_the_same_however_training_runs(tiny_model, tmp_path, probed, prefix, by_rows):
    """With stored states of the frozen layers, and with the library's own attention."""
    whole = train(tiny_model, tmp_path / "one", prefix=tmp_path / "a" if prefix else None, by_rows=by_rows)
    probing = Probing((), 5, None, None)
    seen = train(tiny_model, tmp_path / "two", probing, prefix=tmp_path / "b" if prefix else None, by_rows=by_rows)
    assert same(adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two"))
    assert whole[0].forgetting is None
    found = {probe["step"]: probe["nll"] for probe in seen[0].forgetting["probes"]}
    assert found.keys() == {0, 5, 10, 12}
    others = {probe["step"]: probe["nll"] for probe in probed[1].forgetting["probes"]}
    assert found[0] == pytest.approx(others[0], rel=2e-3)
    assert found[12] == pytest.approx(others[12], rel=2e-2)


def test_the_probe_is_the_nll_of_the_model_as_it_is(tiny_model, tokenizer, probed):
    folder, trained = probed
    rows = english(tokenizer)
    first, last = trained.forgetting["probes"][0], trained.forgetting["probes"][-1]
    base = load_model(tiny_model, Model(name="tiny"))
    assert first["nll"] == pytest.approx(mean_nll(score_rows(base, rows, Watch(), "base")), rel=5e-3)
    live = load_adapter(base, folder / "adapter")
    assert last["nll"] == pytest.approx(mean_nll(score_rows(live, rows, Watch(), "live")), rel=5e-3)
    assert last["change"] == pytest.approx(last["nll"] / first["nll"] - 1)
    assert abs(last["nll"] - first["nll"]) > 0.05


def test_gradients_before_and_after_a_probe_are_equal(tiny_model, tmp_path, monkeypatch):
    """4-bit weights must not be repacked for inference, dropout must come back, no gradient must be left behind."""
    from qcft.training import probe

    seen = []
    english_nll = probe.english_nll

    def gradients(model):
        torch.manual_seed(1)
        model.zero_grad()
        inputs = torch.tensor([[5, 6, 7, 8, 9, 10]])
        embedded = model.get_input_embeddings()(inputs).detach().requires_grad_()
        decoder = model.get_base_model().model
        hooks = dict(decoder._forward_hooks)  # the training's own, which picks the answers of its last batch
        decoder._forward_hooks.clear()
        positions = torch.arange(6)[None]
        states = decoder(inputs_embeds=embedded, position_ids=positions, row_lengths=(6,)).last_hidden_state
        decoder._forward_hooks.update(hooks)
        states.float().pow(3).mean().backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found | {"input": embedded.grad}

    def between(model, *arguments):
        before = gradients(model)
        nll = english_nll(model, *arguments)
        assert all(p.grad is None for p in model.parameters())
        seen.append((before, gradients(model)))
        return nll

    monkeypatch.setattr(probe, "english_nll", between)
    train(tiny_model, tmp_path / "step", Probing((), 4, None, None), settings=TRAIN.model_copy(update={"steps": 4}))
    assert len(seen) == 2
    for before, after in seen:
        assert len(before) > 20
        assert same(before, after)


def test_a_stopped_process_resumes_with_the_same_probes(tiny_model, tmp_path, probed):
    probing = Probing((), 2, None, None)
    watch = Watch(lambda event: watch.ask_to_stop(143) if isinstance(event, Progress) and event.done == 5 else None)
    with pytest.raises(Interrupted, match="step 6 of 12"):
        train(tiny_model, tmp_path / "step", probing, watch)
    with (tmp_path / "step" / "english.jsonl").open("a") as stream:  # a probe after the checkpoint, and half a line
        stream.write('{"step": 8, "nll": 9.0, "change": 3.0, "seconds": 0.1}\n{"step": 1')
    trained, _ = train(tiny_model, tmp_path / "step", probing)
    assert trained.resumed_from == 6
    assert trained.forgetting["probes"] == probed[1].forgetting["probes"]
    lines = [json.loads(line) for line in (tmp_path / "step" / "english.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(0, 13, 2))
    assert {e["step"]: e["english_nll"] for e in log_of(tmp_path / "step") if "english_nll" in e} == {
        line["step"]: line["nll"] for line in lines[1:]
    }
    assert same(adapter_of(tmp_path / "step"), adapter_of(probed[0]))


@pytest.fixture(scope="module")
def stopping(probed):
    """A limit, the step where it is reached, and the one whose adapter is kept."""
    changes = [(p["step"], p["change"]) for p in probed[1].forgetting["probes"]]
    at = next(i for i in range(2, len(changes)) if changes[i][1] > max(0.0, *(c for _, c in changes[:i])))
    limit = (changes[at][1] + max(0.0, *(c for _, c in changes[:at]))) / 2
    return limit, changes[at][0], changes[at - 1][0]


def test_it_stops_at_the_limit_and_keeps_the_adapter_of_the_probe_before(tiny_model, tmp_path, stopping):
    limit, at, kept = stopping
    events = []
    trained, model = train(tiny_model, tmp_path / "step", Probing((), 2, limit, limit), Watch(events.append))
    assert trained.forgetting["stopped_at"] == at
    assert trained.steps == kept
    assert sum(entry["rows"] for entry in trained.exposure) == trained.rows == 4 * kept
    assert not (tmp_path / "step" / "checkpoints" / f"checkpoint-{at}").exists()
    notes = [event.text for event in events if isinstance(event, Note) and event.level == "warning"]
    assert len(notes) == 2
    assert f"at step {at} of 12" in notes[0]
    assert f"the adapter of step {kept} is kept" in notes[1]
    # The adapter as a training that was never probed had it at that step.
    watch = Watch(lambda event: watch.ask_to_stop() if isinstance(event, Progress) and event.done == kept - 1 else None)
    with pytest.raises(Interrupted):
        train(tiny_model, tmp_path / "other", watch=watch)
    checkpoint = tmp_path / "other" / "checkpoints" / f"checkpoint-{kept}"
    found = adapter_of(tmp_path / "step")
    from safetensors.torch import load_file

    assert same(found, load_file(checkpoint / "adapter_model.safetensors"))
    live = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora_" in n}
    assert all(torch.equal(live[name], weight) for name, weight in found.items())


def test_a_training_stopped_while_probed_and_resumed_decides_the_same(tiny_model, tmp_path, stopping):
    limit, at, kept = stopping
    probing = Probing((), 2, None, limit)
    watch = Watch(lambda event: watch.ask_to_stop() if isinstance(event, Progress) and event.done == kept - 1 else None)
    with pytest.raises(Interrupted):
        train(tiny_model, tmp_path / "step", probing, watch)
    trained, _ = train(tiny_model, tmp_path / "step", probing)
    assert (trained.resumed_from, trained.steps, trained.forgetting["stopped_at"]) == (kept, kept, at)


def test_a_rise_by_the_first_probe_leaves_nothing_to_keep(tiny_model, tmp_path):
    with pytest.raises(QcftError, match=r"by step 12, the first probe: over forgetting.stop \(0%\)") as error:
        train(tiny_model, tmp_path / "step", Probing((), 50, None, 1e-9))
    assert "forgetting.every" in error.value.hint


def test_a_probe_that_is_not_finite_ends_the_training(tiny_model, tmp_path):
    settings = TRAIN.model_copy(update={"lr": 1e30, "sft": {"max_grad_norm": 0.0}, "scheduler": "constant"})
    with pytest.raises(QcftError, match=r"the English NLL is (nan|inf) at step 1") as error:
        train(tiny_model, tmp_path / "step", Probing((), 1, None, None), settings=settings)
    assert "train.lr" in error.value.hint


def test_a_lost_record_of_the_start_is_reported(tiny_model, tmp_path):
    probing = Probing((), 2, None, None)
    watch = Watch(lambda event: watch.ask_to_stop() if isinstance(event, Progress) else None)
    with pytest.raises(Interrupted):
        train(tiny_model, tmp_path / "step", probing, watch)
    (tmp_path / "step" / "english.jsonl").unlink()
    with pytest.raises(QcftError, match=r"english.jsonl is missing"):
        train(tiny_model, tmp_path / "step", probing)


@given(
    lengths=st.lists(st.integers(5, 200), min_size=1, max_size=30),
    trained=st.integers(50, 20_000),
    frozen=st.floats(0, 1),
    stop=st.sampled_from([None, 0.2]),
)
def test_probes_stay_within_their_share_of_the_tokens(lengths, trained, frozen, stop):
    from qcft.data.encode import EncodedRow

    rows = [EncodedRow([1] * n, [-100] + [1] * (n - 1)) for n in lengths]
    batches = make_batches([EncodedRow([1] * 50, [1] * 50)], lambda epoch: [0] * (trained // 50), Train(batch=4))
    found = lay_out(Forgetting(stop=stop), rows, batches, frozen)
    budget = COST * batches.tokens_until(batches.steps) * (2 - frozen)
    fewest = sum(lengths[:4])
    if FEWEST_PROBES * fewest > budget:
        assert (found is None) == (stop is None)
        return
    probes = 2 + (batches.steps - 1) // found.every  # the start, every so many steps, the end
    assert probes * found.tokens <= budget
    assert min(4, len(rows)) <= len(found.rows) <= min(16, len(rows))


def test_only_stopping_is_part_of_a_trainings_id(raw_recipe):
    digests = Digests("m", {"phase1": "a", "phase2": "b"}, {"phase2": ("c",)}, "h", english={"phase2": "e"})

    def plan(**forgetting):
        recipe = recipe_from({**raw_recipe, "forgetting": forgetting} if forgetting else raw_recipe)
        return make_plan(recipe, digests)

    def trained(**forgetting):
        return plan(**forgetting).step("phase2").id

    assert plan().step("phase1").id == plan(stop=0.2).step("phase1").id  # which is not probed

    assert trained() == trained(warn=0.5, every=3) == trained(warn=None)
    assert len({trained(), trained(stop=0.2), trained(stop=0.1), trained(stop=0.2, every=3)}) == 4
    assert trained(stop=0.2) == trained(stop=0.2, warn=0.01)


def test_phase_2_is_probed_on_phase_1s_held_out_english(raw_recipe, tmp_path):
    raw_recipe["phases"][1].pop("replay")
    run = run_recipe(recipe_from({**raw_recipe, "forgetting": {"every": 2, "rows": 4}}), runs=tmp_path / "runs")
    assert run.stages["phase1"].metrics["forgetting"] is None
    found = run.stages["phase2"].metrics["forgetting"]
    assert found["rows"] == 4
    assert found["probes"][0]["change"] == 0
    assert 0 < found["share_of_time"] < 1
    assert "english.jsonl" in (json.loads((run.stages["phase2"].folder / "done.json").read_text())["files"])
    start = run.table["stages"][-2]
    assert start["stage"] == "eval/merged"
    assert found["probes"][0]["nll"] == pytest.approx(start["groups"]["phase1 en"]["nll"], rel=0.3)
    assert yaml.safe_load((run.folder / "recipe.yaml").read_text())["forgetting"]["every"] == 2
