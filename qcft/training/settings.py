"""A recipe's `train` section as TRL's SFTConfig, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from qcft.errors import InputError, nearest, short
from qcft.models.load import compute_dtype, device
from qcft.recipe import Recipe, Train
from qcft.training.batches import Batches
from qcft.training.distributed.ranks import sharded, world

if TYPE_CHECKING:
    from trl import SFTConfig

LOSSES = ("nll", "dft", "chunked_nll")  # in TRL; the last is an older name of the first
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check_settings(train: Train) -> None:
    """Check the settings that only TRL knows: extra fields, scheduler, optimizer, trackers.

    Raises InputError.
    """
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames
    from trl import SFTConfig

    known = [f.name for f in fields(SFTConfig)]
    for key in train.sft:
        if key not in known:
            raise InputError(
                f"train.sft: SFTConfig has no field {key!r}",
                nearest(key, known) + "see TRL's documentation of SFTConfig",
            )
    if (loss := train.sft.get("loss_type", "nll")) not in LOSSES:
        raise InputError(f"train.sft: there is no loss_type {loss!r}", f"use {' or '.join(LOSSES)}")
    if loss == "dft" and train.sft.get("label_smoothing_factor"):
        raise InputError(
            "train.sft: loss_type dft and label_smoothing_factor cannot be combined: TRL ignores the smoothing",
            "remove one of them",
        )
    if train.sft.get("activation_offloading") and device() == "cpu":
        raise InputError(
            "train.sft: activation_offloading moves activations from a GPU to main memory, but no GPU is used here",
            "remove it",
        )
    for value, choices, name in (
        (train.scheduler, [str(s.value) for s in SchedulerType], "scheduler"),
        (train.optimizer, ["auto", *(str(o.value) for o in OptimizerNames)], "optimizer"),
    ):
        if value not in choices:
            raise InputError(
                f"train.{name}: there is no {name} {value!r}", nearest(value, choices) + "known: " + ", ".join(choices)
            )
    for tracker in train.report_to:
        package = TRACKERS.get(tracker)
        if package is None:
            raise InputError(f"train.report_to: {tracker!r} is not known", f"use {', '.join(TRACKERS)}")
        if find_spec(package) is None:
            raise InputError(f"train.report_to: {tracker} is not installed", f"pip install {package}")
    try:
        sft_config(train, Path("."), Batches([[]], 1, 1, False), 0, False, False)
    except (TypeError, ValueError) as error:
        raise InputError(f"train.sft: {short(error)}", "see TRL's documentation of SFTConfig") from None


def optimizer_for(train: Train, where: str) -> str:
    """The optimizer of a training, with `auto` resolved: AdamW, on CUDA in 8 bits.

    Not paged: the optimizer states of adapters are small, bitsandbytes keeps paged buffers until the process ends, and
    an error in CUDA's paging ends the process. Not in 8 bits if the weights are sharded, which bitsandbytes lacks.
    """
    if train.optimizer != "auto":
        return train.optimizer
    return "adamw_8bit" if where == "cuda" and not sharded() else "adamw_torch"


def with_optimizers(recipe: Recipe, where: str) -> Recipe:
    """A recipe whose phases name the optimizer that `auto` resolves to, so that it is part of the steps' ids.

    On CPUs alone it is not named: there `auto` has always been the same optimizer.
    """
    if "cuda" not in {where, device()}:
        return recipe
    phases = [
        phase.model_copy(
            update={"train": phase.train.model_copy(update={"optimizer": optimizer_for(phase.train, where)})}
        )
        for phase in recipe.phases
    ]
    return recipe.model_copy(update={"phases": phases})


def sft_config(
    train: Train, checkpoints: Path, batches: Batches, seed: int, checkpointing: bool, by_rows: bool
) -> SFTConfig:
    """TRL's settings for a phase; `checkpointing`: recompute activations; `by_rows`: rows are not padded."""
    import torch
    from trl import SFTConfig

    class OneCard(SFTConfig):  # type: ignore[misc]
        """TRL's settings for a process that uses only the current card."""

        @property
        def n_gpu(self) -> int:  # the Trainer would copy the model to every card, which TRL refuses
            return min(1, int(super().n_gpu))

        @property
        def device(self) -> torch.device:  # the Trainer makes the first card the current one
            found: torch.device
            if device() == "cpu":
                found = super().device
                return found
            with torch.cuda.device(torch.cuda.current_device()):
                found = super().device
            return torch.device("cuda", torch.cuda.current_device()) if world() == 1 else found

    every = train.checkpoint_steps or max(1, min(50, math.ceil(batches.steps / 10)))
    return OneCard(
        output_dir=str(checkpoints),
        learning_rate=train.lr,
        num_train_epochs=1,  # all epochs are in `batches`, one after the other, each in its own order
        per_device_train_batch_size=batches.per_pass,
        gradient_accumulation_steps=max(1, batches.accumulation // world()),  # of each process
        max_length=None,  # rows are truncated already
        padding_free=batches.packed or by_rows,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,  # keeps the numbers of items, which PhaseTrainer needs
        train_sampling_strategy="sequential",  # in the order of the mix
        lr_scheduler_type=train.scheduler,
        warmup_steps=train.warmup if batches.steps > 1 else 0,
        optim=optimizer_for(train, device()),
        gradient_checkpointing=checkpointing,
        bf16=compute_dtype() == torch.bfloat16,
        fp16=compute_dtype() == torch.float16,
        use_cpu=device() == "cpu",
        seed=seed,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=None,  # PhaseTrainer keeps the last two, by step: file times may be wrong
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=train.report_to or "none",
        disable_tqdm=True,
        eval_strategy="no",
        # Routers are never adapted, so this loss has no effect; and not every family's base model returns it.
        **{"router_aux_loss_coef": 0.0, **train.sft},
    )


def above_zero(share: Callable[[int], float], warmup: int) -> Callable[[int], float]:
    """A schedule (step -> share of the learning rate) whose first `warmup` steps rise linearly from above 0.

    transformers' schedules start the warm-up at 0, so that the first step, which matters in a short training, changes
    nothing. Schedules that start above 0 are returned unmodified.
    """
    if share(0) != 0:
        return share
    return lambda step: (step + 1) / (warmup + 1) if step < warmup else share(step)
