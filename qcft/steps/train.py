"""Training a phase: its rows and its replay in their order, its adapter, what need not be done, what fits."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.data.encode import EncodedRow, EncodedSet
from qcft.data.rows import Row
from qcft.errors import QcftError
from qcft.events import Mixed, SourceShare
from qcft.files import file_digest
from qcft.models.adapter_config import WEIGHTS
from qcft.models.adapters import add_lora_over, load_stack
from qcft.models.chat import write_chat
from qcft.models.load import free_memory
from qcft.prepare.prepared import Prepared
from qcft.recipe import Phase, Train
from qcft.replay.rows import read_replay
from qcft.steps.base import StepWork
from qcft.steps.prefix import open_prefix
from qcft.steps.step import Step
from qcft.training.distributed.ranks import rank, world

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qcft.training.agreement import Agreement
    from qcft.training.batches import Batches
    from qcft.training.passes import Fit


class TrainWork(StepWork):
    """Does the `train` steps."""

    def work(self, step: Step, folder: Path) -> dict[str, Any]:
        """Train a phase's adapter on its rows and its replay."""
        from qcft.training.determinism import deterministic

        with deterministic(self.recipe.deterministic):
            return self._work(step, folder)

    def _work(self, step: Step, folder: Path) -> dict[str, Any]:
        from qcft.layers import adapted_in, decoder_layers, frozen_in_words, frozen_whole, lowest_adapted
        from qcft.training.agreement import check_live
        from qcft.training.attention import attend_by_rows
        from qcft.training.batches import make_batches
        from qcft.training.fused import use_triton_where_it_works
        from qcft.training.probe import lay_out
        from qcft.training.sft import train_adapter
        from qcft.training.trainer import Shortcuts

        phase = self.phase(step)
        use_triton_where_it_works(self.watch)
        model = self.load(step)
        agreed, train = self._agreed(model, phase)
        replay = self._replay_sets(phase, step)
        shares = self._shares(phase, replay)
        rows = [
            replace(tokens, source=share.source, name=row.name)
            for share, encoded in shares
            for row, tokens in zip(encoded.rows, encoded.encoded, strict=True)
        ]
        extra = sum(len(encoded.rows) for encoded in replay.values())
        seed = self.recipe.seed
        batches = make_batches(rows, self.prepared.order(phase, extra), train)
        targets = self.recipe.lora.targets
        modules = adapted_in(self.prepared.meta_model, self.recipe, phase, self.measured(step))
        frozen = frozen_in_words(self.prepared.meta_model, targets, modules)
        mixed = Mixed(
            phase.name,
            tuple(share for share, _ in shares),
            batches.steps,
            batches.rows / batches.steps,
            "none" if phase.freeze.kind == "none" else f"{phase.freeze} ({frozen})",
        )
        self.watch.tell(mixed)
        free_memory()  # what loading left behind
        _seed_everything(seed)
        under = [self.adapter(one) for one in step.under]
        if step.adapter is not None:  # start: continue
            adapted = load_stack(model, [*under, self.adapter(step.adapter)], modules)
        else:
            adapted = add_lora_over(model, under, modules, self.recipe.lora)
        check_live(adapted, modules, self.prepared.tokenizer, self.watch)
        below = lowest_adapted(model, modules)
        probing = None
        if self.recipe.forgetting is not None and (english := _english_rows(self.prepared, phase)):
            probing = lay_out(self.recipe.forgetting, english, batches, below / decoder_layers(model)[1])
            if probing is None:
                self.watch.note("no live probe: even a small one would cost over 5% of so short a training")
        by_rows = agreed.packed and attend_by_rows(model, max(len(row.input_ids) for row in rows))
        weights: dict[str, Any] = {"weights": self.weights_digest(step), "quantize": self.recipe.model.quantize}
        if under:
            weights["under"] = [file_digest(folder / WEIGHTS) for folder in under]
        prefix = None
        if step.adapter is None:
            seen = [*rows, *(probing.rows if probing else ())]
            prefix = open_prefix(model, below, seen, batches.rows, weights, train, self.store, self.watch)
        elif train.prefix_cache is True:
            self.watch.note("no prefix cache: an adapter that goes on has a part in the frozen layers too")
        trained = train_adapter(
            adapted,
            self.prepared.tokenizer,
            batches,
            train,
            seed,
            folder,
            self.watch,
            f"training {phase.name}",
            Shortcuts(below, by_rows, prefix, agreed.fused),
            probing,
            self._fit(phase.name, train, modules, batches, by_rows, prefix is not None),
            carried=step.adapter is not None,
        )
        if rank() == 0:
            write_chat(self.prepared.tokenizer, folder / "adapter", self.prepared.described)
        return {
            **asdict(trained),
            "mix": [asdict(share) for share in mixed.shares],
            "adapted_modules": len(modules),
            "frozen_layers": frozen_whole(model, modules),
            "prefix_cache": prefix is not None,
            "trainable_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        }

    def _agreed(self, model: PreTrainedModel, phase: Phase) -> tuple[Agreement, Train]:
        """What of training agrees with the model's own forward pass, and the phase's settings without what does not."""
        from qcft.training.agreement import agreement

        agreed, train = agreement(model, self.prepared.tokenizer, self.watch), phase.train
        instead = []
        if not agreed.packed and train.packing:
            train = train.model_copy(update={"packing": False})
            instead.append("rows are padded, not packed")
        if not agreed.padded:
            train = train.model_copy(update={"micro_batch": 1})
            instead.append("rows are run one at a time")
        if not agreed.fused:
            instead.append("the loss is taken from the model's own logits")
        if instead:
            family = model.config.get_text_config().model_type
            self.watch.note(f"{phase.name}: {' and '.join(instead)} ({family}: {agreed.why})")
        return agreed, train

    def _fit(
        self, phase: str, train: Train, modules: list[str], batches: Batches, by_rows: bool, cut: bool
    ) -> Fit | None:
        """How passes are made to fit, where that is left to qcft: tried out on shapes, with the weights loaded."""
        from qcft.models.load import device, free_bytes
        from qcft.training.footprint import Shape
        from qcft.training.memory import plan_training

        if train.micro_batch != "auto" and (train.gradient_checkpointing != "auto" or device() == "cpu"):
            return None
        shape = Shape(tuple(modules), self.recipe.lora, self.recipe.model.quantize, False, cut, device())
        meta = self.prepared.meta_model
        planned = plan_training(meta, shape, batches, train, by_rows, free_bytes(), loaded=True)
        if planned.unknown:
            self.watch.note(f"{phase}: passes are as small as can be, as {planned.unknown}", "warning")
        elif planned.fit.limit:
            self.watch.note(f"{phase}: passes of at most {planned.fit.limit} tokens, to fit into memory")
        return planned.fit

    def _replay_sets(self, phase: Phase, step: Step) -> dict[str, EncodedSet]:
        """The replay rows as tokens, kind by kind."""
        made = [parent for parent in step.parents if parent.startswith("replay-")]
        if not made:
            return {}
        encoder = self.prepared.replay_encoder(phase)
        by_kind: dict[str, list[Row]] = {}
        for row, kind in read_replay(self.store.opened(made[0]).file("replay.jsonl")):
            by_kind.setdefault(f"replay ({kind})", []).append(row)
        sets = {name: encoder.encode_all(rows) for name, rows in by_kind.items()}
        for name, encoded in sets.items():
            if encoded.left_out:
                raise QcftError(f"{name}: {encoded.left_out} cannot train", "please report this")
        return sets

    def _shares(self, phase: Phase, replay: dict[str, EncodedSet]) -> list[tuple[SourceShare, EncodedSet]]:
        """What the phase trains on, source by source."""
        shares = []
        for source, encoded in zip(self.prepared.sources[phase.name], self.prepared.encoded(phase), strict=True):
            name = f"{source.name} ({source.lang})" if source.lang != "?" else source.name
            left_out = {**source.left_out}
            for reason, n in encoded.left_out.items():
                left_out[reason] = left_out.get(reason, 0) + n
            shares.append((_share(name, encoded, left_out), encoded))
        return shares + [(_share(name, encoded, {}), encoded) for name, encoded in replay.items()]


def _share(name: str, encoded: EncodedSet, left_out: dict[str, int]) -> SourceShare:
    return SourceShare(name, len(encoded.rows), encoded.tokens, encoded.answer_tokens, left_out)


def _seed_everything(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def _english_rows(prepared: Prepared, phase: Phase) -> list[EncodedRow]:
    """Held-out English rows in an order that every arm shares; none for a phase that is not probed, nor where several
    processes train, each of which would probe."""
    group = prepared.english_group(phase) if world() == 1 else None
    if group is None:
        return []
    held = prepared.held_out(group)
    ranked = sorted(zip(held.rows, held.encoded, strict=True), key=lambda pair: pair[0].key)
    return [encoded for _, encoded in ranked]
