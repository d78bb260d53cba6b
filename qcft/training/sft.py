"""One phase's training with TRL's SFTTrainer: checkpoints that are whole, resuming to the digit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from qcft.data.encode import IGNORED, EncodedRow
from qcft.errors import Interrupted, QcftError, is_out_of_memory
from qcft.events import Watch
from qcft.files import SEAL, is_whole, seal
from qcft.models.adapters import keep_adapters_in_fp32, read_trained, read_weights, save_trained
from qcft.recipe import Train
from qcft.training.batches import Batches, Fed
from qcft.training.distributed import shards
from qcft.training.distributed.ranks import rank, sharded, shared_out, world
from qcft.training.head import AnswerTokens, own_loss, summed_nll
from qcft.training.passes import Fit, Passes
from qcft.training.probe import EnglishProbe, Probing, probe_callback
from qcft.training.reporter import reporter
from qcft.training.settings import sft_config

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from qcft.training.prefix import Prefix

KEPT = 2  # checkpoints: the last, and one before it should the last be altered
ITEM = "item"  # the column that says which of the batches' items an example is
ROWS = "rows"  # the rows of what is run at once


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
    exposure: list[dict[str, Any]]
    forgetting: dict[str, Any] | None = None


@dataclass(frozen=True)
class Shortcuts:
    """What a training need not do: `below` layers are frozen under the lowest adapter, and the backward pass stops
    there; `by_rows`, attention goes row by row and nothing is padded; `prefix`, the frozen layers need not run;
    `fused`, TRL's head computes the loss, without all logits at once."""

    below: int = 0
    by_rows: bool = False
    prefix: Prefix | None = None
    fused: bool = True


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
    last = _last_whole(checkpoints, watch)
    padded = not (batches.packed or shortcuts.by_rows)
    passes = Passes(fit or Fit(None, train.gradient_checkpointing is True), padded, checkpoints, watch)
    dealt = shared_out(batches, world())
    config = sft_config(train, checkpoints, dealt, seed, passes.recompute, shortcuts.by_rows)
    if sharded():
        shards.allow_on_cpu()
    start = {name: p.data for name, p in model.named_parameters() if carried and p.requires_grad}
    with _tensorboard_in(folder / "tensorboard"):  # read when the trainer makes its callbacks
        trainer = _make_trainer(model, tokenizer, dealt, config, shortcuts, passes)
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
        resumed_from=int(last.name.split("-")[1]) if last else 0,
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


def _make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    config: SFTConfig,
    shortcuts: Shortcuts,
    passes: Passes,
) -> Any:
    import torch
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
            step = super().training_step

            def run(rows: list[EncodedRow]) -> Any:
                return step(model, {**collate([_example(row) for row in rows]), ROWS: tuple(rows)}, *args, **kwargs)

            rows = [row for item in inputs[ITEM] for row in batches.items[item]]
            if world() > 1:  # a process that divides its passes would wait for the others, and they for it
                return run(rows)
            return passes.run(self.model, self.state.global_step, rows, shortcuts.below, run)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            rows = inputs.pop(ROWS)
            if shortcuts.by_rows:
                inputs["row_lengths"] = tuple(len(row.input_ids) for row in rows)
            if shortcuts.prefix:
                shortcuts.prefix.show(rows, padded=not (batches.packed or shortcuts.by_rows))
            if self.label_smoother is None and self.compute_loss_func is None:
                answers.choose(inputs)
            return super().compute_loss(model, inputs, *args, **kwargs)

        def nll(self, rows: Sequence[EncodedRow]) -> float:
            """The summed NLL of rows' answer tokens; several rows only where attention goes row by row."""
            lengths = tuple(len(row.input_ids) for row in rows)
            device = self.model.device
            inputs: dict[str, Any] = {
                "input_ids": torch.tensor([[token for row in rows for token in row.input_ids]], device=device),
                "labels": torch.tensor([[label for row in rows for label in row.labels]], device=device),
            }
            if shortcuts.by_rows:
                inputs["position_ids"] = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
                inputs["row_lengths"] = lengths
            if shortcuts.prefix:
                shortcuts.prefix.show(rows)
            if not shortcuts.fused:
                labels = inputs.pop("labels")
                return float(summed_nll(self.model(**inputs, use_cache=False).logits, labels))
            answers.choose(inputs)
            outputs = self.model(**inputs, use_cache=False, fused_lm_head=True)
            answers.chosen = None  # where labels are smoothed, training itself does not choose
            return -float(outputs.log_probs.sum())

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            weights = shards.whole(self.model) if sharded() else None
            if rank() == 0:
                save_trained(self.model, Path(output_dir or self.args.output_dir), weights)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            # The Trainer's own loads one adapter only, under whichever name comes first.
            if sharded():
                shards.deal_out(self.model, read_weights(Path(resume_from_checkpoint)))
            else:
                read_trained(self.model, Path(resume_from_checkpoint))

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            if not sharded():
                super()._save_optimizer_and_scheduler(output_dir)
                return
            shards.save_optimizer(self, Path(output_dir))
            if rank() == 0:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is None or not sharded():
                super()._load_optimizer_and_scheduler(checkpoint)
                return
            shards.load_optimizer(self, Path(checkpoint))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            Trainer._save_checkpoint(self, model, trial)  # TRL's own adds a model card to each
            self.accelerator.wait_for_everyone()  # each process writes the state of its generators
            if rank():
                return
            checkpoints = Path(self.args.output_dir)
            seal(checkpoints / f"checkpoint-{self.state.global_step}")
            for old in _newest_first(checkpoints)[KEPT:]:
                shutil.rmtree(old)

    answers = AnswerTokens(model.get_base_model())
    trainer = PhaseTrainer(
        model=model,
        args=config,
        train_dataset=_dataset(batches),
        processing_class=tokenizer,
        compute_loss_func=None if shortcuts.fused else own_loss,
    )
    collate = trainer.data_collator

    def with_items(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**collate(examples), ITEM: tuple(example[ITEM] for example in examples)}

    trainer.data_collator = with_items
    trainer.remove_callback(PrinterCallback)
    return trainer


def _example(row: EncodedRow) -> dict[str, Any]:
    return {"input_ids": row.input_ids, "labels": row.labels}


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


def _newest_first(checkpoints: Path) -> list[Path]:
    """The checkpoints by their steps."""
    return sorted(checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]), reverse=True)


def _last_whole(checkpoints: Path, watch: Watch) -> Path | None:
    """The newest checkpoint that is whole; those that are not are removed, and named unless a kill cut them short."""
    for checkpoint in _newest_first(checkpoints):
        if is_whole(checkpoint):
            return checkpoint
        if (checkpoint / SEAL).exists():
            watch.note(f"{checkpoint.name} is altered; the training goes on from the one before it", "warning")
        if rank() == 0:
            shutil.rmtree(checkpoint)
    return None
