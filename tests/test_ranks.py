"""Several processes that train one phase: the same steps on the same rows, and nearly the same adapter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import qcft
from qcft import api
from qcft.data.encode import IGNORED, EncodedRow
from qcft.events import Progress, Watch
from qcft.files import read_json
from qcft.recipe import load_recipe
from qcft.training.batches import FILLER, Batches, Fed
from qcft.training.distributed.ranks import split_over

from .helpers.planted import check_unused, plant

ROOT = Path(__file__).parents[1]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 4), st.integers(1, 6), st.integers(2, 5), st.lists(st.integers(2, 9), min_size=1)
)
def test_passes_are_sharded_so_that_every_step_keeps_its_rows(count, per_pass, accumulation, processes, lengths):
    items = [[EncodedRow([i] * lengths[i % len(lengths)], [IGNORED, i + 1], "data")] for i in range(count)]
    batches = Batches(items, per_pass, accumulation, packed=per_pass == 1)
    sharded = split_over(batches, processes)
    assert sharded.steps == batches.steps
    size, own_size = per_pass * accumulation, per_pass * sharded.accumulation
    assert sharded.accumulation % processes == 0
    assert len(sharded.items) % (per_pass * processes) == 0
    for step in range(batches.steps):
        real = [item for item in sharded.items[step * own_size : (step + 1) * own_size] if item[0].source != FILLER]
        assert real == items[step * size : (step + 1) * size]
    assert all(row.answer_tokens == 0 for item in sharded.items for row in item if row.source == FILLER)
    # Every rank's passes together are all passes, once each, and what is counted is the rows of one process.
    fed = [Fed(sharded, rank, processes) for rank in range(processes)]
    taken = []
    for step in range(sharded.steps):
        passes = len(sharded.items[step * own_size : (step + 1) * own_size]) // (per_pass * processes)
        for _ in range(passes):
            for rank, one in enumerate(fed):
                first = one.items if one.items >= step * own_size else step * own_size
                own = sharded.items[first + rank * per_pass :][:per_pass]
                one.take(step, range(first + rank * per_pass, first + rank * per_pass + len(own)))
                taken += own
    assert sorted(map(id, taken)) == sorted(map(id, sharded.items))
    (exposure,) = fed[0].exposure(sharded.steps)
    assert exposure["rows"] == count


def trains(event: Progress) -> bool:
    return event.label == "training phase2" and event.done >= 2


WAYS = {"ddp": ["--multi_gpu"], "fsdp": ["--use_fsdp", "--fsdp_version", "2"]}


def launch(recipe: Path, runs: Path, way: str) -> subprocess.CompletedProcess:
    plant(recipe.parent)
    command = [sys.executable, "-P", "-m", "accelerate.commands.launch", *WAYS[way], "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               "-m", "qcft", "run", str(recipe), "--runs", str(runs)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=recipe.parent, capture_output=True, text=True, timeout=300)
    check_unused(recipe.parent)
    return done


@pytest.mark.parametrize(("way", "packing"), [("ddp", True), ("fsdp", False)])
def test_two_processes_train_what_one_does(raw_recipe, tmp_path, way, packing):
    """Both start from weights drawn with one seed; sums of gradients differ in their order only.

    With FSDP each holds half of every weight, and they resume where one process was stopped.
    """
    phase = {**raw_recipe["phases"][1], "replay": None, "anchor": "target-masked:3"}
    phase["train"] = {**phase["train"], "batch": 6, "packing": packing, "lr": 1e-3, "epochs": 1.3}
    raw = {**raw_recipe, "phases": [phase], "answers": {"prompts": 0}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    one = qcft.run(path, runs=tmp_path / "one")
    if way == "fsdp":
        watch = Watch(lambda event: watch.ask_to_stop(143) if isinstance(event, Progress) and trains(event) else None)
        with pytest.raises(qcft.Interrupted):
            api.run_watched(load_recipe(path), tmp_path / "two", watch)
    done = launch(path, tmp_path / "two", way)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("train phase2") == 1, "rank 1 is silent"
    two = tmp_path / "two" / "tiny" / "phase2"
    alone, together = one.stages["phase2"].metrics, read_json(two / "done.json")["metrics"]
    assert (alone["processes"], together["processes"]) == (1, 2)
    assert (together["resumed_from"] > 0) is (way == "fsdp")
    assert (alone["held"], together["held"]) == (1.0, pytest.approx({"ddp": 1.0, "fsdp": 0.5}[way], abs=0.01))
    for key in ("steps", "rows", "tokens", "exposure"):
        assert together[key] == alone[key], key
    assert together["loss"] == pytest.approx(alone["loss"], abs=0.02)
    assert together["terms"]["anchor_kl"] == pytest.approx(alone["terms"]["anchor_kl"], rel=0.05)
    a, b = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (one.stages["phase2"].folder, two))
    assert a.keys() == b.keys()
    moved = torch.cat([w.flatten() for name, w in a.items() if "lora_B" in name])  # from zero
    apart = torch.cat([(b[name] - a[name]).flatten() for name in a if "lora_B" in name])
    assert apart.norm() < 0.1 * moved.norm()


def test_what_accelerate_configures_beyond_data_parallel_is_refused(raw_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw_recipe))
    with pytest.raises(qcft.InputError, match="configured for FSDP"):
        qcft.run(path, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()
