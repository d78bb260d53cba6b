"""`deterministic: true`: PyTorch's deterministic kernels while training, and cuBLAS prepared before CUDA starts."""

import os

import pytest
import torch

import qcft
from qcft import QcftError, api
from qcft.events import Progress, Watch
from qcft.recipe import recipe_from
from qcft.runner.planned import PlannedRecipe
from qcft.training.determinism import deterministic


def trained(recipe, runs):
    """The phases' adapters, and whether each step of training ran deterministically."""
    seen = []

    def look(event):
        if isinstance(event, Progress) and event.label.startswith("training"):
            seen.append(torch.are_deterministic_algorithms_enabled())

    done = api.run_watched(recipe, runs, Watch(look))
    return {
        name: (done.stages[name].folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("phase1", "phase2")
    }, seen


def test_training_is_deterministic_where_set_and_on_a_cpu_the_same(raw_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "x")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    plain, seen = trained(recipe_from(raw_recipe), tmp_path / "runs")
    assert not any(seen)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    asked, seen = trained(recipe_from(raw_recipe, {"deterministic": True}), tmp_path / "runs")
    assert all(seen)
    assert len(seen) > 4
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert asked == plain


def test_only_true_is_part_of_a_trainings_id(raw_recipe):
    def steps(**changes):
        return {step.stage: step.id for step in PlannedRecipe(recipe_from(raw_recipe, changes), Watch()).plan.steps}

    plain = steps()
    assert steps(deterministic=False) == plain
    asked = steps(deterministic=True)
    assert asked["phase1"] != plain["phase1"]
    assert asked["eval/base"] == plain["eval/base"]


def test_an_operation_without_such_a_kernel_is_named():
    def put():
        torch.zeros(4).put_(torch.tensor([0, 1]), torch.ones(2))

    with (
        pytest.raises(QcftError, match="deterministic: put_ does not have a deterministic implementation") as error,
        deterministic(True),
    ):
        put()
    assert error.value.hint == "--set deterministic=false trains without it"
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        put()


def test_it_is_true_or_false(raw_recipe):
    with pytest.raises(qcft.InputError, match="deterministic"):
        recipe_from(raw_recipe, {"deterministic": "sometimes"})
