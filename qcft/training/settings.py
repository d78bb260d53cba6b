"""What a recipe's `train` section is to TRL: its SFTConfig, checked before any work."""

from __future__ import annotations

import math
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.errors import InputError, nearest
from qcft.models.load import compute_dtype, device
from qcft.recipe import Train
from qcft.training.batches import Batches
from qcft.training.ranks import world

if TYPE_CHECKING:
    from peft import PeftModel
    from trl import SFTConfig

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check_settings(train: Train) -> None:
    """Check what only TRL can judge: the extra fields, the scheduler, the optimizer, the trackers.

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
        raise InputError(
            f"train.sft: {' '.join(str(error).split())[:160]}", "see TRL's documentation of SFTConfig"
        ) from None


def sft_config(
    train: Train, checkpoints: Path, batches: Batches, seed: int, checkpointing: bool, by_rows: bool
) -> SFTConfig:
    """TRL's settings for a phase; `checkpointing`: recompute activations, `by_rows`: rows are not padded."""
    import torch
    from trl import SFTConfig

    optimizer = train.optimizer
    if optimizer == "auto":
        optimizer = "paged_adamw_8bit" if device() == "cuda" else "adamw_torch"
    every = train.checkpoint_steps or max(1, min(50, math.ceil(batches.steps / 10)))
    return SFTConfig(
        output_dir=str(checkpoints),
        learning_rate=train.lr,
        num_train_epochs=1,  # all epochs are laid out one after the other, each in an order of its own
        per_device_train_batch_size=batches.per_pass,
        gradient_accumulation_steps=max(1, batches.accumulation // world()),  # of each process
        max_length=None,  # rows come cut to length
        padding_free=batches.packed or by_rows,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",  # the order is the mix's
        lr_scheduler_type=train.scheduler,
        warmup_steps=train.warmup,
        optim=optimizer,
        gradient_checkpointing=checkpointing,
        bf16=compute_dtype() == torch.bfloat16,
        fp16=compute_dtype() == torch.float16,
        use_cpu=device() == "cpu",
        seed=seed,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=train.report_to or "none",
        disable_tqdm=True,
        eval_strategy="no",
        **train.sft,
    )


def checkpointing(model: PeftModel, batches: Batches, train: Train, below: int) -> bool:
    """Whether to recompute activations: as asked, or on a GPU when keeping those of the layers from `below` up would
    take over half of the memory that is free once the weights are loaded.

    Kept per token and layer in 16 bits: about 34 hidden sizes (Korthikanti et al. 2022, arXiv 2205.05198,
    without attention scores), which a gated MLP and LoRA's inputs bring to about 50.
    """
    if train.gradient_checkpointing != "auto":
        return train.gradient_checkpointing
    if device() != "cuda":
        return False
    import torch

    config: Any = model.config.get_text_config()
    per_pass = max(
        sum(len(row.input_ids) for item in batches.items[i : i + batches.per_pass] for row in item)
        for i in range(0, len(batches.items), batches.per_pass)
    )
    needed = per_pass * (config.num_hidden_layers - below) * config.hidden_size * 50
    return bool(needed > 0.5 * torch.cuda.mem_get_info()[0])
