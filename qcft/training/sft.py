"""Training one phase with TRL's SFTTrainer: complete checkpoints, and resuming with identical results."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING

from qcft.errors import Interrupted, QcftError, is_out_of_memory
from qcft.events import Watch
from qcft.models.adapters import keep_adapters_in_fp32, save_trained
from qcft.recipe import Train
from qcft.store.metrics import FedSource, LiveProbe, LossTerms
from qcft.training.batches import Batches
from qcft.training.checkpoints import last_whole, step_of
from qcft.training.distributed import shards
from qcft.training.distributed.ranks import rank, sharded, split_over, world
from qcft.training.passes import Fit, Passes
from qcft.training.probe import EnglishProbe, Probing, probe_callback
from qcft.training.reference import NO_TERMS, Terms
from qcft.training.reporter import reporter
from qcft.training.settings import sft_config
from qcft.training.trainer import NO_SHORTCUTS, Shortcuts, make_trainer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingResult:
    """The result of a training. `exposure`: for each source the rows, tokens and answer tokens that went through the
    model, counted during training, over all epochs; `pass_limit`: the most tokens that ran at once, if memory set a
    limit; `recomputed`: whether activations were; `processes`: how many trained together, each of which held the share
    `held` of the model's weights.
    `loss`: cross-entropy, in nats per answer token. `forgetting`: the results of the live probe. `terms`: for a loss
    with terms besides cross-entropy, the loss of new rows, each term, and the objective."""

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
    terms: LossTerms | None = None


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
    terms: Terms = NO_TERMS,
) -> TrainingResult:
    """Train the adapters on a model and save them in `folder/adapter`; `probing`: how English is probed meanwhile.

    `carried`: the adapters come from an earlier phase, and start with exactly its weights. `terms`: the terms of the
    loss besides cross-entropy. `fit`: how passes run at first (None: as planned); they get smaller when memory runs
    out. Resumes from the last complete checkpoint in `folder/checkpoints`. When asked to stop, writes a checkpoint and
    raises Interrupted. Raises QcftError if the loss is no longer finite, the gradients explode, or one row does not fit
    into memory.
    """
    checkpoints = folder / "checkpoints"
    last = last_whole(checkpoints, watch)
    padded = not (batches.packed or shortcuts.by_rows)
    passes = Passes(fit or Fit(None, train.gradient_checkpointing is True), padded, checkpoints, watch)
    own = split_over(batches, world())
    config = sft_config(train, checkpoints, own, seed, passes.recompute, shortcuts.by_rows)
    if sharded():
        shards.allow_on_cpu()
    start = {name: p.data for name, p in model.named_parameters() if carried and p.requires_grad}
    with _tensorboard_in(folder / "tensorboard"):  # read when the trainer creates its callbacks
        trainer = make_trainer(model, tokenizer, own, config, shortcuts, passes, terms)
    if config.gradient_checkpointing:
        model.disable_input_require_grads()  # TRL turned it on; the Trainer does it again at its start (see reporter)
    keep_adapters_in_fp32(model)
    for name, weights_before in start.items():  # TRL rounds those of a quantised model to bf16
        model.get_parameter(name).data = weights_before
    if sharded():
        shards.keep_precision(trainer)
    english = EnglishProbe(probing, batches, folder, watch, trainer.nll, shortcuts.by_rows) if probing else None
    trainer.add_callback(reporter(batches, folder / "log.jsonl", watch, label, shortcuts.below, english))
    if english:
        trainer.add_callback(probe_callback(english))  # last, so that nothing is saved if it stops the training
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except UnpicklingError:  # only tensors are loaded; pickled code is never run
        raise QcftError(
            f"{last.name if last else 'a checkpoint'} holds more than tensors: it was not written by qcft",
            f"remove {str(last)!r}; the training resumes from the one before it",
        ) from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise QcftError(  # not in a pass, which would have been divided
            "memory ran out between passes of the training",
            "the same command resumes from the last checkpoint; free memory, or use a smaller lora.r",
        ) from None
    stopped = english is not None and english.stopped
    if watch.stop_code is not None and trainer.state.global_step < batches.steps and not stopped:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {batches.steps}; a checkpoint was written",
            "the same command resumes from it",
            watch.stop_code,
        )
    steps = english.go_back(model) if english and stopped else trainer.state.global_step
    weights = shards.whole(model) if sharded() else None
    if rank() == 0:
        save_trained(model, folder / "adapter", weights)
    history = [entry for entry in trainer.state.log_history if entry["step"] <= steps]
    exposure = trainer.fed.exposure(steps)
    return TrainingResult(
        steps=steps,
        rows=sum(entry["rows"] for entry in exposure),
        tokens=batches.tokens_until(steps),
        loss=_latest(history, "loss") or 0.0,
        resumed_from=step_of(last) if last else 0,
        pass_limit=passes.limit,
        recomputed=passes.recompute,
        processes=world(),
        held=shards.held(model) if sharded() else 1.0,
        exposure=exposure,
        forgetting=english.summary() if english else None,
        terms=_terms(history) if terms else None,
    )


def _terms(history: Sequence[Mapping[str, float]]) -> LossTerms:
    return {
        "objective": _latest(history, "objective"),
        "new_loss": _latest(history, "new_loss"),
        "anchor_kl": _latest(history, "anchor_kl"),
        "distil_kl": _latest(history, "distil_kl"),
    }


def _latest(history: Sequence[Mapping[str, float]], name: str) -> float | None:
    """The mean of a value over the last ten steps that logged it."""
    found = [entry[name] for entry in history if name in entry][-10:]
    return sum(found) / len(found) if found else None


@contextmanager
def _tensorboard_in(folder: Path) -> Iterator[None]:
    """Make TensorBoard write to the step's folder, unless the user's environment names another."""
    name = "TENSORBOARD_LOGGING_DIR"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        del os.environ[name]
