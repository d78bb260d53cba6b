"""One phase's training with TRL's SFTTrainer: checkpoints that are whole, resuming to the digit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.data.encode import IGNORED
from qcft.errors import Interrupted, QcftError
from qcft.events import Watch
from qcft.files import is_whole, seal
from qcft.models.adapters import keep_adapters_in_fp32, read_trained, save_trained
from qcft.recipe import Train
from qcft.training.batches import Batches, Fed
from qcft.training.ranks import rank, shared_out, world
from qcft.training.reporter import reporter
from qcft.training.settings import checkpointing, sft_config

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from qcft.training.prefix import Prefix

ITEM = "item"  # the column that says which of the batches' items an example is


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
    dealt = shared_out(batches, world())
    recompute = checkpointing(model, dealt, train, shortcuts.below)
    config = sft_config(train, checkpoints, dealt, seed, recompute, shortcuts.by_rows)
    with _tensorboard_in(folder / "tensorboard"):  # read when the trainer makes its callbacks
        trainer = _make_trainer(model, tokenizer, dealt, config, shortcuts)
    if config.gradient_checkpointing:
        model.disable_input_require_grads()  # once for TRL; the Trainer asks again when it begins (Reporter)
    keep_adapters_in_fp32(model)
    trainer.add_callback(reporter(batches, folder / "log.jsonl", watch, label, shortcuts.below))
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
    if rank() == 0:
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


def _make_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, batches: Batches, config: SFTConfig, shortcuts: Shortcuts
) -> Any:
    from transformers import PrinterCallback, Trainer
    from trl import SFTTrainer

    class PhaseTrainer(SFTTrainer):
        """SFTTrainer whose batches know their rows and count them; its checkpoints hold the adapter, no pickled
        arguments, and a seal."""

        fed = Fed(batches, rank(), world())

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
            self.accelerator.wait_for_everyone()  # each process writes the state of its generators
            if rank() == 0:
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


def _last_whole(checkpoints: Path) -> Path | None:
    """The newest checkpoint that is whole; those that are not are removed."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)
    for checkpoint in found:
        if is_whole(checkpoint):
            return checkpoint
        if rank() == 0:
            shutil.rmtree(checkpoint)
    return None
