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


def test_training_from_stored_states_is_the_plain_training(tmp_path, tokenizer):
    """Row by row, with the prefix cache and without; kernels there need not be equal to the bit."""
    from qcft.store import Store

    from .helpers.prefix import TRAIN, set_to, train
    from .helpers.tiny import make_llama

    model = make_llama(tmp_path / "model", tokenizer, layers=5)
    plain, _, _ = train(model, tmp_path / "plain", Store(tmp_path / "p"), set_to(TRAIN, prefix_cache=False))
    losses, _, prefix = train(model, tmp_path / "cached", Store(tmp_path / "c"))
    assert prefix is not None
    assert losses == pytest.approx(plain, rel=2e-2)
