"""TRL's SFTTrainer for a phase: its data are the numbers of items, and each pass is divided to fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.data.encode import EncodedRow
from qcft.models.adapters import read_trained, read_weights, save_trained
from qcft.private import check_training
from qcft.training.batches import Batches, Fed, check_collated
from qcft.training.checkpoints import sealing
from qcft.training.distributed import shards
from qcft.training.distributed.ranks import rank, sharded, world
from qcft.training.head import AnswerTokens, own_loss, summed_nll
from qcft.training.passes import Passes
from qcft.training.reference import NO_TERMS, Reference, Terms
from qcft.training.settings import above_zero

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from qcft.training.prefix import Prefix

ITEM = "item"  # the column with the number of an example's item in the batches
ROWS = "rows"  # the rows that run at once


@dataclass(frozen=True)
class Shortcuts:
    """Work that a training can skip. `below`: the number of frozen layers under the lowest adapter, where the backward
    pass stops; `by_rows`: attention runs row by row, without padding; `prefix`: stored states replace the frozen
    layers; `fused`: TRL's head computes the loss, without all logits at once; `shared`: the number of lowest layers
    that run once for both the trained model and the one that it started from."""

    below: int = 0
    by_rows: bool = False
    prefix: Prefix | None = None
    fused: bool = True
    shared: int = 0


NO_SHORTCUTS = Shortcuts()


def make_trainer(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    batches: Batches,
    config: SFTConfig,
    shortcuts: Shortcuts,
    passes: Passes,
    terms: Terms = NO_TERMS,
) -> Any:
    """The trainer of a phase. Raises QcftError if a library lacks a method that it overrides."""
    import torch
    from datasets import Dataset
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import PrinterCallback
    from trl import SFTTrainer

    check_training()

    class PhaseTrainer(SFTTrainer):
        """SFTTrainer that receives the numbers of items and counts them; its checkpoints hold the adapter, but no
        pickled arguments."""

        fed = Fed(batches, rank(), world())

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.fed.take(self.state.global_step, inputs[ITEM])
            step = super().training_step

            def run(rows: list[EncodedRow]) -> Any:
                examples = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
                collated = collate(examples)
                check_collated(collated["labels"], rows)
                return step(model, {**collated, ROWS: tuple(rows)}, *args, **kwargs)

            rows = [row for item in inputs[ITEM] for row in batches.items[item]]
            if world() > 1:  # processes that divide their passes differently would wait for each other
                return run(rows)
            forget = reference.forget if reference else lambda: None
            return passes.run(self.model, self.state.global_step, rows, shortcuts.below, run, forget)

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            rows = inputs.pop(ROWS)
            if shortcuts.by_rows:
                inputs["row_lengths"] = tuple(len(row.input_ids) for row in rows)
            if shortcuts.prefix:
                shortcuts.prefix.show(rows, padded=not (batches.packed or shortcuts.by_rows))
            loss = super().compute_loss

            def plain() -> Any:
                if self.label_smoother is None and self.compute_loss_func is None:
                    answers.choose(inputs)
                return loss(model, inputs, *args, **kwargs)

            if reference is None:
                return plain()
            answers.chosen = None  # left from the pass before
            times = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            return reference.loss(inputs, rows, plain, times / kwargs["num_items_in_batch"])

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if reference and "loss" in logs:
                logs["objective"] = logs.pop("loss")
                logs.update(reference.logged(lambda sums: self.accelerator.reduce(sums.to(self.args.device), "sum")))
            super().log(logs, *args, **kwargs)

        def nll(self, rows: Sequence[EncodedRow]) -> float:
            """The summed NLL of rows' answer tokens; several rows only if attention runs row by row."""
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
            answers.chosen = None  # with smoothed labels, training does not use it
            return -float(outputs.log_probs.sum())

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            weights = shards.whole(self.model) if sharded() else None
            if rank() == 0:
                save_trained(self.model, Path(output_dir or self.args.output_dir), weights)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            # The Trainer's own method loads one adapter only, under the first name.
            if sharded():
                shards.load_weights(self.model, read_weights(Path(resume_from_checkpoint)))
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

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            scheduler = super().create_scheduler(num_training_steps, optimizer)
            warmup = self.args.get_warmup_steps(num_training_steps)
            if isinstance(scheduler, LambdaLR) and warmup:
                shares = [above_zero(share, warmup) for share in scheduler.lr_lambdas]
                scheduler = self.lr_scheduler = LambdaLR(scheduler.optimizer, shares)
            return scheduler

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """Write none: TRL would write one beside each checkpoint."""

    def items_of(examples: list[dict[str, int]]) -> dict[str, Any]:
        items = tuple(example[ITEM] for example in examples)
        labels = [label for item in items for row in batches.items[item] for label in row.labels]
        return {ITEM: items, "labels": torch.tensor(labels)}  # from which the Trainer counts a step's answer tokens

    reference = Reference(model, terms, shortcuts.shared) if terms else None
    answers = AnswerTokens(model.get_base_model())
    loss = None
    if not shortcuts.fused:  # TRL accepts another loss only in place of `nll`
        loss, config.loss_type = own_loss(config.loss_type, config.label_smoothing_factor), "nll"
    trainer = PhaseTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict({ITEM: range(len(batches.items))}),
        processing_class=tokenizer,
        compute_loss_func=loss,
    )
    collate, trainer.data_collator = trainer.data_collator, items_of
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(sealing())
    return trainer
