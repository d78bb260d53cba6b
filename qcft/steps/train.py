"""Training a phase: the order of its rows and replay, its adapter, skipped work, and passes that fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from qcft.data.encode import EncodedRow, EncodedSet
from qcft.data.rows import Row
from qcft.errors import QcftError
from qcft.events import Mixed, SourceShare
from qcft.files import file_digest
from qcft.models.adapter_config import WEIGHTS
from qcft.models.adapters import add_lora_over, load_stack
from qcft.models.chat import write_chat
from qcft.models.load import free_memory, load_model
from qcft.prepare.rows import PhaseRows, order_of
from qcft.prepare.settings import ADDED, CIRCUMSTANCE, SPREAD, Limits, ModelSettings, replay_limits
from qcft.recipe import Anchor, Forgetting, FreezeSpec, Lora, Train
from qcft.replay.rows import read_replay
from qcft.steps.layers import FILE
from qcft.steps.prefix import open_prefix
from qcft.steps.step import Bench, Step, Work
from qcft.store.metrics import LayersFile, TrainMetrics
from qcft.training.distributed.ranks import rank, sharded, world
from qcft.training.reference import Terms, terms_in_words
from qcft.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qcft.training.agreement import Agreement
    from qcft.training.batches import Batches
    from qcft.training.footprint import SecondPass
    from qcft.training.memory import Planned
    from qcft.training.passes import Fit


# Settings that change how a training runs or is watched, not its result.
CIRCUMSTANCES = {"report_to", "checkpoint_steps", "gradient_checkpointing", "prefix_cache", "micro_batch"}


@dataclass(frozen=True)
class Training(Work[TrainMetrics]):
    """Trains a phase's adapter on its rows and its replay.

    `carried`: the precision in which the adapter of an earlier phase is continued. `forgetting`: the live probe on the
    rows of `english`, which changes nothing unless it may stop the training. `peft`: `lora.peft`, if it is given.
    """

    kind: ClassVar[str] = "train"
    format: ClassVar[int] = 5  # warm-up starts above 0

    model: ModelSettings = field(metadata=SPREAD)
    quantize: str
    seed: int
    lora: Lora = field(metadata={"without": {"peft"}})
    freeze: FreezeSpec
    rows: str
    limits: Limits
    replay_system: str | None
    train: Train = field(metadata={"without": CIRCUMSTANCES | {"text"}})  # text: among the limits
    balance: Mapping[str, Any] | None = field(default=None, metadata=ADDED)
    deterministic: bool = field(default=False, metadata=ADDED)
    carried: str | None = field(default=None, metadata=ADDED)
    anchor: Anchor | None = field(default=None, metadata=ADDED)
    replay_loss: Literal["answer", "distil"] = field(default="answer", metadata=ADDED)
    peft: Mapping[str, Any] | None = field(default=None, metadata=ADDED)
    forgetting: Forgetting | None = field(default=None, metadata=CIRCUMSTANCE)
    english: str | None = field(default=None, metadata=CIRCUMSTANCE)

    def settings(self) -> dict[str, Any]:
        """The settings, with those of the live probe if it may stop the training."""
        found = super().settings()
        if self.forgetting is not None and self.forgetting.stop is not None and self.english:
            found["forgetting"] = {**self.forgetting.model_dump(exclude={"warn"}), "english": self.english}
        return found

    def do(self, step: Step, bench: Bench, folder: Path) -> TrainMetrics:
        """Train into `folder/adapter`."""
        from qcft.training.determinism import deterministic

        with deterministic(self.deterministic):
            return self._do(step, bench, folder)

    def summary(self, metrics: TrainMetrics) -> str:
        """Steps, tokens, loss and its terms; the share of replay; the result of the live probe."""
        trained = (
            f"{counted(metrics['steps'], 'step')}, {counted(metrics['tokens'], 'token')}, loss {metrics['loss']:.3f}"
        )
        if terms := metrics.get("terms"):
            trained += f" ({terms_in_words(terms)})"
        return trained + _replayed(metrics) + _probed(metrics)

    def written(self, step: Step, bench: Bench, planned: Planned | None) -> int:
        """The adapter, two checkpoints, and stored states."""
        assert planned is not None
        return 3 * planned.memory.adapters + 2 * planned.memory.optimizer + planned.stored

    def _do(self, step: Step, bench: Bench, folder: Path) -> TrainMetrics:
        from qcft.layers import adapted_modules, decoder_layers, frozen_in_words, frozen_whole, lowest_adapted
        from qcft.training.agreement import check_live
        from qcft.training.attention import attend_by_rows
        from qcft.training.batches import make_batches
        from qcft.training.footprint import SecondPass
        from qcft.training.fused import use_triton_where_it_works
        from qcft.training.prefix import cannot_split
        from qcft.training.probe import lay_out
        from qcft.training.sft import train_adapter
        from qcft.training.trainer import Shortcuts

        phase, watch, meta = step.phase or "", bench.watch, bench.model.meta_model
        use_triton_where_it_works(watch)
        model = load_model(bench.weights(step), bench.model.asked, self.quantize, sharded=sharded())
        agreed, train = self._agreed(model, phase, bench)
        replay = self._replay_sets(step, bench)
        own = bench.rows.phase(step.phase, self.rows)
        new = bench.rows.encoded(own, self.limits, self.balance)
        shares = _shares(own, new, replay)
        rows = [
            replace(tokens, source=share.source, name=row.name, replay=share.source in replay)
            for share, encoded in shares
            for row, tokens in zip(encoded.rows, encoded.encoded, strict=True)
        ]
        terms = Terms(self.anchor, self.replay_loss == "distil")
        if terms.distil and not replay:
            raise QcftError(
                f"{phase}: replay.loss is distil, but there are no replay rows",
                f"give {phase}.replay more rows, or omit {phase}.replay.loss",
            )
        extra = sum(len(encoded.rows) for encoded in replay.values())
        batches = make_batches(rows, order_of(own, new, extra, self.seed, self.balance is not None), train)
        modules = adapted_modules(meta, self.lora.targets, self.freeze, self.seed, _measured(step, bench))
        frozen = frozen_in_words(meta, self.lora.targets, modules)
        mixed = Mixed(
            phase,
            tuple(share for share, _ in shares),
            batches.steps,
            batches.rows / batches.steps,
            "none" if self.freeze.kind == "none" else f"{self.freeze} ({frozen})",
            str(terms),
        )
        watch.emit(mixed)
        if batches.steps == 1:
            watch.note(
                f"{phase} is trained for 1 optimizer step only ({counted(batches.rows, 'row')}, train.batch "
                f"{train.batch}), without warm-up; for more steps, lower train.batch or raise train.epochs",
                "warning",
            )
        free_memory()  # what loading left behind
        _seed_everything(self.seed)
        under = [bench.adapter(one) for one in step.under]
        if step.adapter is not None:  # start: continue
            adapted = load_stack(model, [*under, bench.adapter(step.adapter)], modules, copied=bool(terms))
        else:
            adapted = add_lora_over(model, under, modules, self.lora)
        check_live(adapted, modules, bench.model.tokenizer, watch, self.peft)
        below = lowest_adapted(model, modules)
        probing = None
        if self.forgetting is not None and (english := self._english_rows(bench)):
            probing = lay_out(self.forgetting, english, batches, below / decoder_layers(model)[1])
            if probing is None:
                watch.note(
                    "English is not tracked during this training: it is too short (tracking would take more than 5% of "
                    "the time)"
                )
        by_rows = agreed.packed and attend_by_rows(model, max(len(row.input_ids) for row in rows))
        weights: dict[str, Any] = {"weights": bench.weights_digest(step), "quantize": self.quantize}
        if under:
            weights["under"] = [file_digest(folder / WEIGHTS) for folder in under]
        prefix = None
        if step.adapter is None:
            seen = [*rows, *(probing.rows if probing else ())]
            prefix = open_prefix(model, below, seen, batches.rows, weights, train, bench.store, watch)
        elif train.prefix_cache is True:
            watch.note("no prefix cache: a continued adapter also changes the frozen layers")
        shared = below if step.adapter is None and prefix is None and cannot_split(model, train) is None else 0
        second = SecondPass(shared > 0, step.adapter is not None) if terms else None
        trained = train_adapter(
            adapted,
            bench.model.tokenizer,
            batches,
            train,
            self.seed,
            folder,
            watch,
            f"training {phase}",
            Shortcuts(below, by_rows, prefix, agreed.fused, shared),
            probing,
            self._fit(phase, train, modules, batches, by_rows, prefix is not None, second, bench),
            carried=step.adapter is not None,
            terms=terms,
        )
        if rank() == 0:
            write_chat(bench.model.tokenizer, folder / "adapter", bench.model.described)
        found = {
            **asdict(trained),
            "mix": [asdict(share) for share in mixed.shares],
            "adapted_modules": len(modules),
            "frozen_layers": frozen_whole(model, modules),
            "prefix_cache": prefix is not None,
            "trainable_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        }
        return cast("TrainMetrics", found)

    def _agreed(self, model: PreTrainedModel, phase: str, bench: Bench) -> tuple[Agreement, Train]:
        """How training agrees with the model's own forward pass, and the train settings changed where it does not."""
        from qcft.training.agreement import agreement

        agreed, train = agreement(model, bench.model.tokenizer, bench.watch), self.train
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
            bench.watch.note(f"{phase}: {' and '.join(instead)} ({family}: {agreed.why})")
        return agreed, train

    def _fit(
        self,
        phase: str,
        train: Train,
        modules: list[str],
        batches: Batches,
        by_rows: bool,
        cut: bool,
        second: SecondPass | None,
        bench: Bench,
    ) -> Fit | None:
        """How passes are made to fit, if qcft decides it: estimated from shapes, with the weights loaded."""
        from qcft.models.load import device, free_bytes
        from qcft.training.footprint import TrainingShape
        from qcft.training.memory import plan_training

        if train.micro_batch != "auto" and (train.gradient_checkpointing != "auto" or device() == "cpu"):
            return None
        shape = TrainingShape(tuple(modules), self.lora, self.quantize, False, cut, device(), second)
        meta = bench.model.meta_model
        planned = plan_training(meta, shape, batches, train, by_rows, free_bytes(), loaded=True)
        if planned.unknown:
            bench.watch.note(f"{phase}: passes are as small as possible, as {planned.unknown}", "warning")
        elif planned.fit.limit:
            bench.watch.note(f"{phase}: passes of at most {planned.fit.limit} tokens, to fit into memory")
        return planned.fit

    def _replay_sets(self, step: Step, bench: Bench) -> dict[str, EncodedSet]:
        """The replay rows as tokens, by kind."""
        made = [parent for parent in step.parents if parent.startswith("replay-")]
        if not made:
            return {}
        encoder = bench.rows.encoder(replay_limits(self.limits, self.replay_system))
        by_kind: dict[str, list[Row]] = {}
        for row, kind in read_replay(bench.store.opened(made[0]).file("replay.jsonl")):
            by_kind.setdefault(f"replay ({kind})", []).append(row)
        sets = {name: encoder.encode_all(rows) for name, rows in by_kind.items()}
        for name, encoded in sets.items():
            if encoded.left_out:
                raise QcftError(f"{name}: {encoded.left_out} cannot be used for training", "please report this")
        return sets

    def _english_rows(self, bench: Bench) -> list[EncodedRow]:
        """Held-out English rows in an order that all arms share; none for a phase that is not probed, or with several
        processes, each of which would probe."""
        if world() > 1 or self.english is None:
            return []
        held = bench.rows.measured(bench.rows.live[self.english])
        ranked = sorted(zip(held.rows, held.encoded, strict=True), key=lambda pair: pair[0].key)
        return [encoded for _, encoded in ranked]


def _measured(step: Step, bench: Bench) -> dict[str, float] | None:
    """The measurements that the freeze spec depends on, by module; None if it depends on names only."""
    for parent in step.parents:
        found = bench.store.opened(parent)
        if found.has(FILE):
            return cast("LayersFile", found.json(FILE))["modules"]
    return None


def _shares(
    own: PhaseRows, new: Sequence[EncodedSet], replay: Mapping[str, EncodedSet]
) -> list[tuple[SourceShare, EncodedSet]]:
    """The rows that the phase trains on, by source."""
    shares = []
    for source, encoded in zip(own.sources, new, strict=True):
        name = f"{source.name} ({source.lang})" if source.lang != "?" else source.name
        if source.rows[0].text is not None:
            name += ", raw text"
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


def _replayed(metrics: TrainMetrics) -> str:
    """The share of replay in the trained rows."""
    fed = metrics["exposure"]
    replay = [entry for entry in fed if entry["source"].startswith("replay (")]
    if not replay:
        return ""
    rows, tokens = (sum(e[k] for e in replay) / sum(e[k] for e in fed) for k in ("rows", "answer_tokens"))
    return f"; replay was {rows:.1%} of the rows and {tokens:.1%} of the answer tokens"


def _probed(metrics: TrainMetrics) -> str:
    """The result of the live probe, and its cost."""
    found = metrics.get("forgetting")
    if not found:
        return ""
    last = next(probe for probe in reversed(found["probes"]) if probe["step"] <= metrics["steps"])
    return (
        f"; English NLL {last['change']:+.1%} ({counted(len(found['probes']), 'probe')} of "
        f"{counted(found['rows'], 'row')}, "
        f"{found['share_of_time']:.1%} of the time)"
    )
