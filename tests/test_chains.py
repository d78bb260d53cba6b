"""Chains of phases: stacked, continued, merged, from the base; each trained, resumed, measured, merged."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

import qcft
from qcft import api
from qcft.events import Note, Progress, StepBegun, Watch
from qcft.files import read_json
from qcft.models.adapters import add_lora_over, load_stack
from qcft.models.load import evaluating, load_model
from qcft.prepare.prepared import Prepared
from qcft.recipe import Lora, Model, recipe_from


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("chains") / "runs"


@pytest.fixture
def chain(raw_recipe, color_data):
    """A recipe of as many phases as starts are named: en, es, pt."""

    def make(*starts, **changes):
        first, second = raw_recipe["phases"]
        phases = [{**first, "train": {**first["train"], "epochs": 1}}]
        for i, start in enumerate(starts):
            data = [{"path": str(color_data / f"{('es', 'pt')[i]}.jsonl"), "lang": ("es", "pt")[i], "take": 16}]
            train = {**second["train"], "epochs": 1}
            phases.append({"name": f"phase{i + 2}", "data": data, "start": start, "train": train})
        raw = {**raw_recipe, "phases": phases, "name": "-".join(starts), "answers": {"prompts": 1, "max_new_tokens": 4}}
        return recipe_from(raw, changes)

    return make


def nll(done):
    return {s["stage"]: {g: v["nll"] for g, v in s["groups"].items()} for s in done.table["stages"]}


def weights(done, stage):
    return load_file(done.stages[stage].folder / "adapter" / "adapter_model.safetensors")


def test_a_stack_starts_exactly_where_the_phase_before_ended(tiny_model, chain, shared_runs):
    """No requantisation: the live model under a fresh adapter is the phase-1 model, to the bit."""
    done = api.run(chain("stacked"), runs=shared_runs)
    assert not any(stage.startswith("merged") for stage in done.stages)
    one, two = (done.stages[f"phase{n}"].folder / "adapter" for n in (1, 2))
    ids = torch.arange(3, 43).reshape(2, 20)
    live = load_stack(load_model(tiny_model, Model(name="tiny")), [one])
    fresh = add_lora_over(
        load_model(tiny_model, Model(name="tiny")), [one], ["model.layers.1.self_attn.q_proj"], Lora(r=4)
    )
    trainable = [n for n, p in fresh.named_parameters() if p.requires_grad]
    assert len(trainable) == 2
    assert all(".default." in name for name in trainable)
    with evaluating(live), evaluating(fresh):
        assert torch.equal(live(ids).logits, fresh(ids).logits)
    stack = load_stack(load_model(tiny_model, Model(name="tiny")), [one, two])
    alone = load_stack(load_model(tiny_model, Model(name="tiny")), [two])
    with evaluating(stack), evaluating(alone):
        assert not torch.equal(stack(ids).logits, live(ids).logits)
        assert not torch.equal(stack(ids).logits, alone(ids).logits)
    assert not any(p.requires_grad for p in stack.parameters())


def test_each_start_learns_and_the_table_has_a_row_per_stage(chain, shared_runs):
    for starts in (("stacked", "stacked"), ("continue", "stacked"), ("stacked", "merged"), ("base", "continue")):
        done = api.run(chain(*starts), runs=shared_runs)
        table = nll(done)
        assert table["eval/phase2"]["phase2 es"] < table["eval/base"]["phase2 es"] - 0.3
        assert table["eval/phase3"]["phase3 pt"] < table["eval/phase2"]["phase3 pt"]
        assert [s["stage"] for s in done.table["stages"]][:3] == ["eval/base-16bit", "eval/base", "eval/phase1"]
        names = {(c["from_name"], c["to_name"]) for c in done.table["changes"]}
        assert {("phase1", "phase3"), ("base", "phase3"), ("phase1", "phase2"), ("phase2", "phase3")} <= names


def test_a_stack_merges_in_one_go_before_a_merged_phase(chain, shared_runs):
    done = api.run(chain("stacked", "merged"), runs=shared_runs)
    assert [s for s in done.stages if s.startswith("merged")] == ["merged-phase2"]
    kept = done.stages["kept-merged-phase2"].metrics
    assert kept["groups"] == ["phase1 en", "phase2 es"]
    assert kept["share"] is None or kept["share"] > 0.5
    assert kept["kl"] > 0
    assert 0.5 < kept["agreement"] <= 1
    assert kept["compared_tokens"] > 0


def test_continue_trains_the_same_adapter_further_and_keeps_frozen_layers_unmodified(chain, shared_runs):
    done = api.run(chain("continue", **{"phase2.freeze": "first:1"}), runs=shared_runs)
    before, after = weights(done, "phase1"), weights(done, "phase2")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "layers.0." not in name}
    assert done.stages["phase2"].metrics["trainable_parameters"] == sum(before[n].numel() for n in moved)


def test_a_continued_adapter_starts_from_the_same_numbers_not_rounded_to_bf16(chain, shared_runs):
    """A step too small to see: what is left is how the adapter was carried over."""
    done = api.run(chain("continue", **{"phase2.train.lr": 1e-12, "phase2.train.steps": 1}), runs=shared_runs)
    before, after = weights(done, "phase1"), weights(done, "phase2")
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-9) for name in before)


def interrupted(recipe, runs, label, step):
    def stop(event):
        if isinstance(event, Progress) and event.label == label and event.done == step:
            watch.ask_to_stop()

    watch = Watch(stop)
    with pytest.raises(qcft.Interrupted):
        api.run_watched(recipe, runs, watch)


@pytest.mark.parametrize("starts", [("stacked", "stacked"), ("continue",)])
def test_resuming_restores_every_adapter_and_the_optimizer(chain, starts, shared_runs, tmp_path):
    last = f"phase{len(starts) + 1}"
    changes = {f"{last}.train.checkpoint_steps": 2, f"{last}.train.epochs": 2, "lora.dropout": 0.1}
    recipe = chain(*starts, **changes)
    whole = api.run(recipe, runs=shared_runs)
    shutil.copytree(shared_runs, tmp_path / "runs", symlinks=True)
    shutil.rmtree(tmp_path / "runs" / ".steps" / whole.stages[last].step)
    interrupted(recipe, tmp_path / "runs", f"training {last}", 3)
    events = []
    again = api.run_watched(recipe, tmp_path / "runs", Watch(events.append))
    assert again.stages[last].metrics["resumed_from"] > 0
    assert "resumed" in {e.state for e in events if isinstance(e, StepBegun)}
    a, b = weights(whole, last), weights(again, last)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_prefix_cache_under_a_stack_changes_nothing(chain, shared_runs, tmp_path):
    """The frozen layers carry phase 1's adapter, and their stored states do too."""
    changes = {"phase2.freeze": "first:2", "phase2.train.epochs": 2}
    done = [
        api.run(chain("stacked", **changes, **{"phase2.train.prefix_cache": asked}), runs=tmp_path / str(asked))
        for asked in (True, False)
    ]
    assert [run.stages["phase2"].metrics["prefix_cache"] for run in done] == [True, False]
    a, b = (weights(run, "phase2") for run in done)
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-5), name


def test_replay_of_a_stacked_phase_is_answered_by_the_live_model(chain, shared_runs, tmp_path):
    changes = {"phase1.train.epochs": 12, "phase2.replay": {"ratio": 0.2, "max_new_tokens": 24}}
    done = api.run(chain("stacked", **changes), runs=tmp_path / "runs")
    step = read_json(done.stages["replay"].folder / "step.json")["inputs"]
    assert step["adapter"] == done.stages["phase1"].step
    assert done.stages["replay"].metrics["rows"] > 0


def test_an_adapter_made_elsewhere_can_be_under_a_stack(chain, shared_runs, raw_recipe, color_data):
    first = api.run(chain("stacked"), runs=shared_runs)
    raw = chain("stacked").model_dump(mode="json")
    raw["phases"][0] = {"name": "phase1", "adapter": str(first.stages["phase1"].folder / "adapter")}
    raw["probe"] = [{"path": str(color_data / "en.jsonl"), "lang": "en"}]
    done = api.run(recipe_from({**raw, "name": "brought"}), runs=shared_runs)
    a, b = weights(first, "phase2"), weights(done, "phase2")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_continued_adapter_has_no_prefix_cache_and_says_why(chain, tmp_path):
    events = []
    recipe = chain("continue", **{"phase2.freeze": "first:1", "phase2.train.prefix_cache": True})
    done = api.run(recipe, runs=tmp_path / "runs", listener=events.append)
    assert not done.stages["phase2"].metrics["prefix_cache"]
    assert any("a continued adapter" in e.text for e in events if isinstance(e, Note))


def test_a_limit_on_kl_refuses_and_names_the_alternative(chain, shared_runs):
    with pytest.raises(qcft.QcftError, match="KL") as error:
        api.run(chain("merged", **{"merge.max_kl": 1e-9}), runs=shared_runs)
    assert "stacked" in error.value.hint


def test_an_adapter_that_is_more_than_plain_lora_is_refused_under_a_stack(chain, shared_runs, tiny_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = load_model(tiny_model, Model(name="tiny"), quantize="none")
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)).save_pretrained(tmp_path / "dora")
    raw = chain("stacked").model_dump(mode="json")
    raw["phases"][0] = {"name": "phase1", "adapter": str(tmp_path / "dora")}
    with pytest.raises(qcft.InputError, match="part of a stack") as error:
        api.run(recipe_from({**raw, "name": "dora"}), runs=tmp_path / "runs")
    assert "merged" in error.value.hint
    assert not (tmp_path / "runs").exists()
    by_change = recipe_from({**raw, "name": "dora"}, {"phase2.start": "merged", "phase2.freeze": "most-changed:0.5"})
    with pytest.raises(qcft.InputError, match="is not a product of two factors") as error:
        api.run(by_change, runs=tmp_path / "runs")
    assert "layers:" in error.value.hint
    assert not (tmp_path / "runs").exists()
    merged = api.run(recipe_from({**raw, "name": "dora"}, {"phase2.start": "merged"}), runs=tmp_path / "runs")
    assert merged.stages["merged"].metrics["merged_weights"] == 3


def test_replay_draws_on_all_earlier_phases_by_weight(chain, shared_runs):
    """The third phase replays rows of the first and, at three times the weight, of the second."""
    mix = [{"kind": "phase1", "weight": 1}, {"kind": "phase1", "phase": "phase2", "weight": 3}]
    done = api.run(chain("stacked", "stacked", **{"phase3.replay": {"ratio": 0.5, "mix": mix}}), runs=shared_runs)
    parts = done.stages["replay"].metrics["parts"]
    assert [part["reason"] for part in parts] == ["rows of phase1", "rows of phase2"]
    assert [part["rows"] for part in parts] == [4, 12]  # of the 16 that make up half beside 16 new ones
    fed = {entry["source"]: entry["rows"] for entry in done.stages["phase3"].metrics["exposure"]}
    assert fed["replay (phase1)"] == 4
    assert fed["replay (phase1, phase2)"] == 12


def test_the_prompts_of_an_earlier_phase_are_in_its_language(chain):
    recipe = chain("merged", "merged", **{"phase3.replay": {"ratio": 0.5, "phase": "phase2"}})
    (pool,) = Prepared(recipe, Watch()).pools["phase3"]
    assert (pool.reason, pool.language) == ("prompts of phase2", "es")
    assert all("de que color" in row.prompt[0].content and not row.completion for row in pool.rows)


@pytest.mark.parametrize(
    ("replay", "says"),
    [
        ({"ratio": 0.2, "kind": "phase1", "phase": "phase9"}, "'phase9' is not a phase before phase3"),
        ({"ratio": 0.2, "kind": "phase1", "phase": "phase3"}, "'phase3' is not a phase before phase3"),
        ({"ratio": 0.2, "kind": "english", "phase": "phase1"}, "phase is for replay of kind phase1 or generative"),
        ({"ratio": 0.2, "phase": "phase1", "mix": ["phase1"]}, "both mix and one kind"),
    ],
)
def test_replay_of_a_phase_that_is_not_before(chain, tmp_path, replay, says):
    with pytest.raises(qcft.InputError, match=says):
        api.run(chain("merged", "merged", **{"phase3.replay": replay}), runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
