"""The whole pipeline in fp16 with a scaled loss, as cards without bf16 run it; here on a CPU."""

import importlib
import json
import pkgutil
import sys

import accelerate
import pytest
import torch
from safetensors.torch import load_file

import qcft
from qcft import api
from qcft.events import Progress, Watch
from qcft.recipe import recipe_from


@pytest.fixture
def scalers(monkeypatch):
    """Compute in fp16 everywhere, and scale losses, which accelerate does on cards only; the scalers that were made."""
    for module in pkgutil.iter_modules(importlib.import_module("qcft.training").__path__, "qcft.training."):
        importlib.import_module(module.name)
    for name, module in list(sys.modules.items()):
        if name.startswith("qcft.") and hasattr(module, "compute_dtype"):
            monkeypatch.setattr(module, "compute_dtype", lambda: torch.float16)
    made, plain = [], accelerate.Accelerator.__init__

    def scaled(self, *arguments, **options):
        plain(self, *arguments, **options)
        assert self.state.mixed_precision == "fp16"
        self.native_amp = True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=made_with["scale"])
        made.append(self.scaler)

    made_with = {"scale": 65536.0}
    monkeypatch.setattr(accelerate.Accelerator, "__init__", scaled)
    return made, made_with


def nll(done):
    return {s["stage"]: {g: v["nll"] for g, v in s["groups"].items()} for s in done.table["stages"]}


def norms(done, stage):
    lines = (done.stages[stage].folder / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["grad_norm"] for line in lines]


def test_two_phases_with_replay_frozen_layers_and_the_live_probe(raw_recipe, tmp_path, scalers):
    raw_recipe["phases"][0]["train"]["epochs"] = 4
    replay = {"ratio": 0.2, "max_new_tokens": 8, "filters": {"language": None}, "on_shortfall": "repeat"}
    raw_recipe["phases"][1]["replay"] = replay
    raw_recipe["phases"][1]["train"]["prefix_cache"] = True
    raw_recipe["phases"][1] |= {"anchor": "target-masked", "replay": {**replay, "loss": "distil"}}
    raw_recipe["forgetting"] = {"every": 2, "rows": 2}
    done = api.run_watched(recipe_from(raw_recipe), tmp_path / "runs", Watch())
    table = nll(done)
    assert len(scalers[0]) == 2
    assert table["eval/phase1"]["phase1 en"] < table["eval/base"]["phase1 en"] - 1
    assert table["eval/phase2"]["phase2 es"] < table["eval/merged"]["phase2 es"] - 0.2
    assert done.stages["phase2"].metrics["prefix_cache"]
    assert done.stages["phase2"].metrics["forgetting"]["probes"]
    assert all(value > 0 for value in done.stages["phase2"].metrics["terms"].values())
    adapter = load_file(done.stages["phase2"].folder / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in adapter.values())


def test_steps_that_overflow_are_skipped_and_resuming_keeps_the_scale(raw_recipe, tmp_path, scalers):
    """A scale so large that the first steps overflow; stopped and resumed, to the bit of one that was not."""
    made, made_with = scalers
    made_with["scale"] = 2.0**26
    raw_recipe["phases"] = raw_recipe["phases"][:1]
    raw_recipe["phases"][0]["train"] |= {"checkpoint_steps": 1, "epochs": 3}
    recipe = recipe_from(raw_recipe)
    whole = api.run_watched(recipe, tmp_path / "whole", Watch())
    found = norms(whole, "phase1")
    assert not all(map(torch.isfinite, map(torch.tensor, found[:2])))
    assert all(map(torch.isfinite, map(torch.tensor, found[-4:])))
    assert made[0].get_scale() < 2.0**26
    table = nll(whole)
    assert table["eval/phase1"]["phase1 en"] < table["eval/base"]["phase1 en"] - 0.5

    def stop(event):
        if isinstance(event, Progress) and event.label == "training phase1" and event.done == 6:
            watch.ask_to_stop()

    watch = Watch(stop)
    with pytest.raises(qcft.Interrupted):
        api.run_watched(recipe, tmp_path / "cut", watch)
    made_with["scale"] = 65536.0
    cut = api.run_watched(recipe, tmp_path / "cut", Watch())
    assert made[-1].get_scale() == made[0].get_scale()
    files = [done.stages["phase1"].folder / "adapter" / "adapter_model.safetensors" for done in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()
