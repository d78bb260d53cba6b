"""One phase's training with TRL's SFTTrainer: checkpoints that are whole, resuming to the digit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from qcft.errors import Interrupted, QcftError, is_out_of_memory
from qcft.events import Watch
from qcft.models.adapters import keep_adapters_in_fp32, save_trained
from qcft.recipe import Train
from qcft.store.metrics import FedSource, LiveProbe
from qcft.training.batches import Batches
from qcft.training.checkpoints import last_whole, step_of
from qcft.training.distributed import shards
from qcft.training.distributed.ranks import rank, sharded, shared_out, world
from qcft.training.passes import Fit, Passes
from qcft.training.probe import EnglishProbe, Probing, probe_callback
from qcft.training.reporter import reporter
from qcft.training.settings import sft_config
from qcft.training.trainer import NO_SHORTCUTS, Shortcuts, make_trainer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Trained:
    """What a training came to. `exposure`: for each source the rows, tokens and answer tokens that went
    through the model, as counted while they did, all epochs together; `pass_limit`, most tokens that were run at
    once where memory set a limit; `recomputed`, whether activations were; `processes` that trained together, of
    which each held the share `held` of the model's weights.
    `forgetting`: what the live probe found."""

    steps: int
    rows: int
    tokens: int
    loss: float
    resumed_from: int
    pass_limit: int | None
    recomputed: bool
    processes: int
    held: float
    exposure: list[FedSource]
    forgetting: LiveProbe | None = None


def train_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    train: Train,
    seed: int,
    folder: Path,
    watch: Watch,
    label: str,
    shortcuts: Shortcuts = NO_SHORTCUTS,
    probing: Probing | None = None,
    fit: Fit | None = None,
    carried: bool = False,
) -> Trained:
    """Train the adapters on a model, leaving them in `folder/adapter`; `probing` looks at English meanwhile.

    `carried`: the adapters come from an earlier phase, and start from its weights to the bit.
    `fit`: how passes are run to begin with (None: as laid out); smaller ones when memory runs out. Goes on from the
    last whole checkpoint in `folder/checkpoints`. When a stop is asked for, a checkpoint is written and Interrupted
    raised. Raises QcftError when the loss is no longer finite, the gradients explode, or one row does not fit into
    memory.
    """
    checkpoints = folder / "checkpoints"
    last = last_whole(checkpoints, watch)
    padded = not (batches.packed or shortcuts.by_rows)
    passes = Passes(fit or Fit(None, train.gradient_checkpointing is True), padded, checkpoints, watch)
    dealt = shared_out(batches, world())
    config = sft_config(train, checkpoints, dealt, seed, passes.recompute, shortcuts.by_rows)
    if sharded():
        shards.allow_on_cpu()
    start = {name: p.data for name, p in model.named_parameters() if carried and p.requires_grad}
    with _tensorboard_in(folder / "tensorboard"):  # read when the trainer makes its callbacks
        trainer = make_trainer(model, tokenizer, dealt, config, shortcuts, passes)
    if config.gradient_checkpointing:
        model.disable_input_require_grads()  # once for TRL; the Trainer asks again when it begins (Reporter)
    keep_adapters_in_fp32(model)
    for name, weights_before in start.items():  # TRL rounded those of a quantised model to bf16
        model.get_parameter(name).data = weights_before
    if sharded():
        shards.keep_precision(trainer)
    english = EnglishProbe(probing, batches, folder, watch, trainer.nll, shortcuts.by_rows) if probing else None
    trainer.add_callback(reporter(batches, folder / "log.jsonl", watch, label, shortcuts.below, english))
    if english:
        trainer.add_callback(probe_callback(english))  # last, so that where it ends the training nothing is saved
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except UnpicklingError:  # what is no tensor is not loaded, and not run
        raise QcftError(
            f"{last.name if last else 'a checkpoint'} holds more than tensors: qcft did not write it so",
            f"remove {str(last)!r}; the training goes on from the one before it",
        ) from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise QcftError(  # not in a pass, which would have been made smaller
            "memory ran out between passes of the training",
            "the same command resumes from the last checkpoint; free memory, or use a smaller lora.r",
        ) from None
    stopped = english is not None and english.stopped
    if watch.stop_code is not None and trainer.state.global_step < batches.steps and not stopped:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {batches.steps}; a checkpoint was written",
            "the same command goes on from it",
            watch.stop_code,
        )
    steps = english.go_back(model) if english and stopped else trainer.state.global_step
    weights = shards.whole(model) if sharded() else None
    if rank() == 0:
        save_trained(model, folder / "adapter", weights)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry and entry["step"] <= steps]
    exposure = trainer.fed.exposure(steps)
    return Trained(
        steps=steps,
        rows=sum(entry["rows"] for entry in exposure),
        tokens=batches.tokens_until(steps),
        loss=sum(losses[-10:]) / max(1, len(losses[-10:])),
        resumed_from=step_of(last) if last else 0,
        pass_limit=passes.limit,
        recomputed=passes.recompute,
        processes=world(),
        held=shards.held(model) if sharded() else 1.0,
        exposure=exposure,
        forgetting=english.summary() if english else None,
    )


@contextmanager
def _tensorboard_in(folder: Path) -> Iterator[None]:
    """Have TensorBoard's files written to the step, unless the user's environment names a folder."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        del os.environ[name]
