"""Where work runs: one card of several, the CPU on purpose, and cards that torch cannot use, by fake drivers."""

import os
import stat
import subprocess
import sys
import time

import pytest
import torch
import yaml

from qcft import InputError
from qcft.events import Watch
from qcft.models import gpus
from qcft.models.load import device
from qcft.recipe import Train, recipe_from
from qcft.runner.planned import PlannedRecipe
from qcft.training import speed
from qcft.training.settings import optimizer_for


@pytest.fixture
def recipe_file(raw_recipe, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw_recipe))
    return path


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """Put an `nvidia-smi` that lists a card on the search path, or one that fails."""

    def put(name="NVIDIA GeForce RTX 3090", version="550.54.15", capability="8.6", fails="", knows_capability=True):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        program = folder / "nvidia-smi"
        known = f"echo '{name}, {version}, {capability}'"
        if not knows_capability:
            known = "echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2"
        lines = ['case "$1" in', f"*compute_cap*) {known};;", f"*) echo '{name}, {version}';;", "esac"]
        program.write_text("#!/bin/sh\n" + (f"echo '{fails}'; exit 9\n" if fails else "\n".join(lines) + "\n"))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("QCFT_DEVICE", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(gpus, "PROC", tmp_path / "proc")

    return put


@pytest.fixture
def two_cards(monkeypatch):
    """As far as torch says, two cards; the first is the current one."""
    current = [0]
    monkeypatch.delenv("QCFT_DEVICE", raising=False)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: current[0],
        "get_device_name": lambda index=None: f"Card {current[0] if index is None else index}",
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "get_device_capability": lambda *_: (8, 6),
        "set_device": lambda one: current.__setitem__(0, torch.device("cuda", one).index if one != "cuda" else 0),
        "is_bf16_supported": lambda *_, **__: True,
        "_exchange_device": lambda one: (current[0], current.__setitem__(0, one))[0],
        "_maybe_exchange_device": lambda one: current.__setitem__(0, one),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return current


@pytest.mark.parametrize(
    ("card", "built", "says", "helps"),
    [
        ({}, None, "built without CUDA and cannot use the GPU (NVIDIA GeForce RTX 3090, driver 550.54.15)", "cu126"),
        (
            {},
            "13.0",
            "(CUDA 13.0) needs NVIDIA driver 580 or later (NVIDIA GeForce RTX 3090, driver",
            "cu126",
        ),
        ({"version": "580.65.06"}, None, "built without CUDA", "cu130"),
        ({"version": "580.65.06", "capability": "6.1"}, None, "built without CUDA", "cu126"),
        (
            {"version": "470.1"},
            "12.6",
            "needs NVIDIA driver 525 or later",
            "update the NVIDIA driver to 525 or later",
        ),
        ({"capability": "12.0"}, "13.0", "driver 580", "update the NVIDIA driver to 580 or later, then"),
        ({"capability": "3.5"}, None, "built without CUDA", "no PyTorch version that qcft supports has kernels for it"),
        ({"version": "460.9", "knows_capability": False}, "13.0", "driver 580", "driver to 525"),
        (
            {"version": "580.65.06"},
            "13.0",
            "cannot use the GPU (NVIDIA GeForce RTX 3090, driver 580",
            "restart",
        ),
    ],
)
def test_a_card_that_torch_cannot_use_stops_a_run_before_anything_is_written(
    qcft, driver, recipe_file, tmp_path, monkeypatch, card, built, says, helps
):
    driver(**card)
    monkeypatch.setattr(torch.version, "cuda", built)
    code, _, err = qcft("run", recipe_file)
    message, hint = err.strip().splitlines()[-2:]
    assert code == 2
    assert says in message
    assert helps in hint
    assert hint.endswith("--cpu trains on the CPU")
    assert not (tmp_path / "runs").exists()
    code, out, _ = qcft("doctor")
    assert code == 1
    assert "to fix GPU: " in out


def test_nor_does_an_ablation_start(qcft, driver, raw_recipe, tmp_path, monkeypatch):
    driver()
    monkeypatch.setattr(torch.version, "cuda", None)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**raw_recipe, "ablation": {"arms": [{"name": "plain", "set": {}}]}}))
    code, _, err = qcft("ablate", path, "--in-process")
    assert code == 2
    assert "cannot use the GPU" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_cards_do_not_count(driver, monkeypatch, hidden):
    driver()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert gpus.unusable_gpu() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert gpus.unusable_gpu()


def test_a_card_in_proc_counts_only_with_a_driver_that_fails(driver, tmp_path):
    driver(fails="Failed to initialize NVML: Driver/library version mismatch")
    assert gpus.unusable_gpu() is None
    (tmp_path / "proc" / "0000:01:00.0").mkdir(parents=True)
    what, helps = gpus.unusable_gpu()
    assert "version mismatch" in what
    assert helps == "restart the machine"
    (tmp_path / "bin" / "nvidia-smi").unlink()
    assert gpus.unusable_gpu() is None


def test_the_cpu_on_purpose(qcft, driver, recipe_file, monkeypatch):
    """--cpu anywhere on the line, for every command; libraries that look for a card see none."""
    driver()
    monkeypatch.setenv("QCFT_DEVICE", "cuda")
    code, out, _ = qcft("--cpu", "run", recipe_file, "--dry-run")
    assert code == 0
    assert "train phase1" in out
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert qcft("check", recipe_file, "--cpu", "--rows", "0")[0] == 0
    assert "not used, as the CPU was requested" in qcft("doctor", "--cpu")[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device() == "cpu"
    monkeypatch.setenv("QCFT_DEVICE", "CUDA")
    assert device() == "cuda"


@pytest.mark.parametrize(
    ("asked", "says", "hint"),
    [
        ("banana", "QCFT_DEVICE='banana' is not a device", "use cpu, cuda"),
        ("cuda:", "QCFT_DEVICE='cuda:' is not a device", "use cpu, cuda"),
        ("cuda", "QCFT_DEVICE=cuda: torch finds no such GPU; it sees none", "use another, or cpu"),
        ("cuda:3", "QCFT_DEVICE=cuda:3: torch finds no such GPU; it sees none", "use another, or cpu"),
    ],
)
@pytest.mark.parametrize("command", ["run", "check"])
def test_a_device_that_is_not_there(qcft, recipe_file, tmp_path, monkeypatch, command, asked, says, hint):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("QCFT_DEVICE", asked)
    code, _, err = qcft(command, recipe_file)
    assert code == 2
    assert says in err
    assert hint in err
    assert not (tmp_path / "runs").exists()


def test_cpu_and_tasks_with_gpus_contradict_each_other(qcft, raw_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("QCFT_DEVICE", "")  # put back after --cpu changes it
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    path = tmp_path / "recipe.yaml"
    ablation = {"arms": [{"name": "plain", "set": {}}], "gpus": 0.5}
    path.write_text(yaml.safe_dump({**raw_recipe, "ablation": ablation}))
    code, _, err = qcft("ablate", path, "--on", "ray", "--cpu")
    assert code == 2
    assert "--cpu with ablation.gpus=0.5" in err
    assert "--set ablation.gpus=0" in err
    assert not (tmp_path / "runs").exists()


def test_one_card_of_several_is_the_current_one(two_cards, monkeypatch):
    assert gpus.choose_gpu() == "cuda:0 of 2 (Card 0)"
    monkeypatch.setenv("QCFT_DEVICE", "cuda:1")
    assert gpus.choose_gpu() == "cuda:1 of 2 (Card 1)"
    assert two_cards == [1]
    monkeypatch.setenv("QCFT_DEVICE", "cuda:2")
    with pytest.raises(InputError, match="it sees 2, cuda:0 to cuda:1"):
        gpus.choose_gpu()


def test_kernels_for_newer_cards_only(two_cards, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
    with pytest.raises(InputError, match="has no kernels for the GPU") as error:
        gpus.choose_gpu()
    assert "whl/cu126" in error.value.hint


def test_the_trainer_sees_one_card_the_current_one():
    """With two cards, as torch says; in a process of its own, as accelerate keeps what it found."""
    done = subprocess.run([sys.executable, "-c", TWO], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["1", "cuda:1", "NOT_PARALLEL", "1"], done.stderr[-2000:]


TWO = """
import torch, trl
trl.SFTConfig
current = [1]
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 2
torch.cuda.current_device = lambda: current[0]
torch.cuda.is_bf16_supported = lambda *a, **k: True
torch.cuda.get_device_capability = lambda *a: (8, 6)
torch.cuda.set_device = lambda one: current.__setitem__(0, torch.device(one).index or 0)
torch.cuda._exchange_device = lambda one: (current[0], current.__setitem__(0, one))[0]
torch.cuda._maybe_exchange_device = lambda one: current.__setitem__(0, one)
from pathlib import Path
from qcft.recipe import Train
from qcft.training.batches import Batches
from qcft.training.settings import sft_config
made = sft_config(Train(), Path("."), Batches([[]], 1, 1, False), 0, False, False)
print(made.n_gpu, made.device, made.parallel_mode.name, current[0])
"""


def test_what_auto_resolves_to_is_part_of_a_step_on_cuda_only(raw_recipe, monkeypatch):
    """And stays so where the run is looked at later, on a machine without a card."""

    def train_steps(recipe):
        planned = PlannedRecipe(recipe, Watch())
        return planned.pinned_recipe(), {s.stage: s.id for s in planned.plan.steps if s.kind == "train"}

    recipe = recipe_from(raw_recipe)
    kept, on_cpu = train_steps(recipe)
    assert kept.phases[0].train.optimizer == "auto"
    explicit = recipe_from(raw_recipe, {"phase1.train.optimizer": "adamw_8bit", "phase2.train.optimizer": "adamw_8bit"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kept, on_cuda = train_steps(recipe)
    monkeypatch.undo()
    assert [phase.train.optimizer for phase in kept.phases] == ["adamw_8bit", "adamw_8bit"]
    assert not set(on_cuda.values()) & set(on_cpu.values())
    assert train_steps(kept)[1] == train_steps(explicit)[1] == on_cuda
    paged = recipe_from(raw_recipe, {"phase1.train.optimizer": "paged_adamw_8bit"})
    assert train_steps(paged)[1]["phase1"] not in {on_cuda["phase1"], on_cpu["phase1"]}
    assert optimizer_for(Train(optimizer="paged_adamw_8bit"), "cuda") == "paged_adamw_8bit"


def test_a_card_that_is_slow_to_synchronize_is_timed_by_sequences(monkeypatch):
    """Five milliseconds for each synchronisation, which would hide what a product takes."""
    waited = []

    def synchronize():
        waited.append(True)
        time.sleep(0.005)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    done = []
    rate = speed.per_second(lambda: done.append(True))
    assert rate > 2000
    assert len(waited) < len(done) / 4
