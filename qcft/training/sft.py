"""One phase's training with TRL's SFTTrainer: checkpoints that are whole, resuming to the digit."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.data.encode import IGNORED
from qcft.errors import InputError, Interrupted, QcftError, nearest
from qcft.events import Progress, Watch
from qcft.files import is_whole, seal, write_text
from qcft.layers import decoder_layers
from qcft.models.adapters import keep_adapters_in_fp32, read_trained, save_trained
from qcft.models.load import compute_dtype, device, peak_memory
from qcft.recipe import Train
from qcft.training.batches import Batches, Fed

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from qcft.training.prefix import Prefix

ITEM = "item"  # the column that says which of the batches' items an example is
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


@dataclass(frozen=True)
class Trained:
    """What a training came to. `exposure`: for each source the rows, tokens and answer tokens that went
    through the model, as counted while they did, all epochs together."""

    steps: int
    rows: int
    tokens: int
    loss: float
    resumed_from: int
    exposure: list[dict[str, Any]]


@dataclass(frozen=True)
class Shortcuts:
    """What a training need not do: `below` layers are frozen under the lowest adapter, and the backward pass stops
    there; `by_rows`, attention goes row by row and nothing is padded; `prefix`, the frozen layers need not run."""

    below: int = 0
    by_rows: bool = False
    prefix: Prefix | None = None


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
        _config(train, Path("."), Batches([[]], 1, 1, False), 0, False, False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"train.sft: {' '.join(str(error).split())[:160]}", "see TRL's documentation of SFTConfig"
        ) from None


def train_adapter(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    train: Train,
    seed: int,
    folder: Path,
    watch: Watch,
    label: str,
    shortcuts: Shortcuts = Shortcuts(),
) -> Trained:
    """Train the adapters on a model, leaving them in `folder/adapter`.

    Goes on from the last whole checkpoint in `folder/checkpoints`. When a stop is asked for, a checkpoint
    is written and Interrupted raised. Raises QcftError when the loss is no longer finite or the GPU's
    memory runs out.
    """
    import torch

    checkpoints = folder / "checkpoints"
    last = _last_whole(checkpoints)
    checkpointing = _checkpointing(model, batches, train, shortcuts.below)
    config = _config(train, checkpoints, batches, seed, checkpointing, shortcuts.by_rows)
    with _tensorboard_in(folder / "tensorboard"):  # read when the trainer makes its callbacks
        trainer = _make_trainer(model, tokenizer, batches, config, shortcuts)
    if config.gradient_checkpointing:
        model.disable_input_require_grads()  # once for TRL; the Trainer asks again when it begins (Reporter)
    keep_adapters_in_fp32(model)
    trainer.add_callback(_reporter(batches, folder / "log.jsonl", watch, label, shortcuts.below))
    try:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    except torch.cuda.OutOfMemoryError:
        raise QcftError(
            "the GPU's memory ran out while training",
            "try --set NAME.train.gradient_checkpointing=true, a smaller train.max_length or micro_batch",
        ) from None
    if watch.stop_code is not None and trainer.state.global_step < batches.steps:
        raise Interrupted(
            f"stopped at step {trainer.state.global_step} of {batches.steps}; a checkpoint was written",
            "the same command goes on from it",
            watch.stop_code,
        )
    save_trained(model, folder / "adapter")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Trained(
        steps=trainer.state.global_step,
        rows=batches.rows,
        tokens=batches.tokens_until(batches.steps),
        loss=sum(losses[-10:]) / max(1, len(losses[-10:])),
        resumed_from=int(last.name.split("-")[1]) if last else 0,
        exposure=trainer.fed.exposure(trainer.state.global_step),
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


def _config(
    train: Train, checkpoints: Path, batches: Batches, seed: int, checkpointing: bool, by_rows: bool
) -> SFTConfig:
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
        gradient_accumulation_steps=batches.accumulation,
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


def _make_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, batches: Batches, config: SFTConfig, shortcuts: Shortcuts
) -> Any:
    from transformers import PrinterCallback, Trainer
    from trl import SFTTrainer

    class PhaseTrainer(SFTTrainer):
        """SFTTrainer whose batches know their rows and count them; its checkpoints hold the adapter, no pickled
        arguments, and a seal."""

        fed = Fed(batches)

        def _set_signature_columns_if_needed(self) -> None:
            super()._set_signature_columns_if_needed()
            if ITEM not in self._signature_columns:
                self._signature_columns.append(ITEM)

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.fed.take(self.state.global_step, int((inputs["labels"] != IGNORED).sum()))
            return super().training_step(model, inputs, *args, **kwargs)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            rows = [row for item in inputs.pop(ITEM) for row in batches.items[item]]
            if shortcuts.by_rows:
                inputs["row_lengths"] = tuple(len(row.input_ids) for row in rows)
            if shortcuts.prefix:
                shortcuts.prefix.show(rows)
            if self.label_smoother is None:
                answers.choose(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            save_trained(self.model, Path(output_dir or self.args.output_dir))

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            # The Trainer's own loads one adapter only, under whichever name comes first.
            read_trained(self.model, Path(resume_from_checkpoint))

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            Trainer._save_checkpoint(self, model, trial)  # TRL's own adds a model card to each
            seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    answers = _Answers(model.get_base_model())
    trainer = PhaseTrainer(model=model, args=config, train_dataset=_dataset(batches), processing_class=tokenizer)
    collate = trainer.data_collator

    def with_items(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**collate(examples), ITEM: tuple(example[ITEM] for example in examples)}

    trainer.data_collator = with_items
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Answers:
    """Has the head score the tokens that bear loss and no others; without Triton, TRL scores every token."""

    def __init__(self, model: Any) -> None:
        self.chosen: Any = None
        model.base_model.register_forward_hook(self._keep_chosen)

    def choose(self, inputs: dict[str, Any]) -> None:
        """Replace a batch's labels by those that bear loss, each in the place of the token before it."""
        labels = inputs.pop("labels")[:, 1:]
        self.chosen = labels != IGNORED
        inputs["shift_labels"] = labels[self.chosen][None]

    def _keep_chosen(self, module: Any, arguments: Any, output: Any) -> None:
        if self.chosen is not None:
            output.last_hidden_state = output.last_hidden_state[:, :-1][self.chosen][None]


def _dataset(batches: Batches) -> Any:
    from datasets import Dataset, Features, List, Value

    features = {"input_ids": List(Value("int32")), "labels": List(Value("int32")), ITEM: Value("int32")}
    columns: dict[str, list[Any]] = {
        "input_ids": [[t for row in item for t in row.input_ids] for item in batches.items],
        "labels": [[t for row in item for t in row.labels] for item in batches.items],
        ITEM: list(range(len(batches.items))),
    }
    if batches.packed:
        features["seq_lengths"] = List(Value("int32"))
        columns["seq_lengths"] = [[len(row.input_ids) for row in item] for item in batches.items]
    return Dataset.from_dict(columns, features=Features(features))


def _reporter(batches: Batches, log: Path, watch: Watch, label: str, below: int) -> Any:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        """Tells progress after every step, keeps log.jsonl, and hears the wish to stop."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begun, self.first = time.monotonic(), state.global_step
            if args.gradient_checkpointing:
                # TRL and, just before this, the Trainer ask for gradients of the embeddings' output, which walks
                # the backward pass through every frozen layer. Non-reentrant checkpointing does not need them.
                kwargs["model"].disable_input_require_grads()
                _checkpoint_from(kwargs["model"], below)
            if log.is_file():  # steps after the checkpoint are trained, and logged, again
                lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
                write_text(log, "".join(line for line in lines if _step_of(line) <= state.global_step))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if watch.stop_code is not None:
                control.should_save = True
                control.should_training_stop = True

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
        ) -> None:
            if not logs or "loss" not in logs:
                return
            step, loss = state.global_step, logs["loss"]
            if not math.isfinite(loss):
                raise QcftError(f"the loss is {loss} at step {step}", "try a lower train.lr")
            tokens = batches.tokens_until(step)
            rate = (tokens - batches.tokens_until(self.first)) / max(1e-9, time.monotonic() - self.begun)
            kind, peak = peak_memory()
            entry = {
                "step": step,
                "loss": loss,
                "lr": logs.get("learning_rate"),
                "grad_norm": logs.get("grad_norm"),
                "token_accuracy": logs.get("mean_token_accuracy"),
                "tokens": tokens,
                "tokens_per_second": round(rate, 1),
                f"peak_{kind}_bytes": peak,
            }
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
            stats = {"loss": f"{loss:.3f}", "speed": f"{rate:,.0f} tokens/s", "peak": f"{peak / 2**30:.1f} GiB {kind}"}
            watch.tell(Progress(label, step, batches.steps, "steps", stats))

    return Reporter()


def _checkpoint_from(model: Any, below: int) -> None:
    """Recompute no layer under the lowest adapter: the backward pass ends above, so nothing of theirs is kept."""
    base = model.get_base_model()
    for layer in base.get_submodule(decoder_layers(base)[0])[:below]:
        layer.gradient_checkpointing = False


def _step_of(line: str) -> float:
    """The step a line of log.jsonl is about; a line cut short by a kill is after every step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _last_whole(checkpoints: Path) -> Path | None:
    """The newest checkpoint that is whole; those that are not are removed."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for checkpoint in found:
        if is_whole(checkpoint):
            return checkpoint
        shutil.rmtree(checkpoint)
    return None


def _checkpointing(model: PeftModel, batches: Batches, train: Train, below: int) -> bool:
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
