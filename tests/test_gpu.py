"""On CUDA: the same pipeline, its optimizer and its memory; skips itself where there is no GPU."""

import pytest
import torch

import qcft
from qcft.recipe import recipe_from

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_two_phases_on_the_gpu(raw_recipe, tmp_path):
    run = qcft.run(recipe_from(raw_recipe), runs=tmp_path / "runs")
    nll = {s["stage"]: s["groups"]["phase2 es"]["nll"] for s in run.table["stages"]}
    assert nll["eval/phase2"] < nll["eval/base"] - 0.5
    assert run.stages["phase2"].metrics["peak_GPU_bytes"] > 0
