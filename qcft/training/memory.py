"""The memory that a training needs, by part, and how its passes are made to fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qcft.data.encode import EncodedRow
from qcft.errors import QcftError, short
from qcft.layers import decoder_layers, linear_modules, lowest_adapted
from qcft.models.adapters import trained_numbers
from qcft.models.size import HALF, weight_bytes
from qcft.recipe import Train
from qcft.training.batches import Batches
from qcft.training.footprint import Footprint, Pass, TrainingShape, footprint
from qcft.training.passes import Fit, divided
from qcft.training.settings import optimizer_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL = 4  # bytes of a number in fp32
NOTHING = Footprint(0, 0, 0, 0)
ROOM = 0.9  # share of the free memory to fill
# The tokenizer, the rows, and freed blocks of some hundred KB that glibc keeps between live tensors: measured as half a
# GiB within a few steps, whatever the passes (tests/benchmarks/memory.py). CUDA's allocator reuses blocks.
KEPT = 1 << 29
# Bytes an optimizer stores per trained number; others are counted as AdamW. Those in 8 bits have a constant for each
# 256 numbers of each moment.
STATES = {"adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 2 + 8 / 256, "sgd": 0, "adafactor": 0.1, "lion_8bit": 1.02}
ADAMW = 8


@dataclass(frozen=True)
class Memory:
    """Bytes of a training by part. `weights`: in 4 bits, with their quantization `constants`; `halves`: what stays in
    16 bits (embeddings, head, norms; without quantisation, all weights); `file`: the part of the weights' file that
    stays mapped on a CPU until the system reclaims it; `logits`: those of the head, with their temporaries; `kept`:
    freed blocks that the CPU's allocator does not return."""

    weights: int
    constants: int
    halves: int
    file: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    kept: int

    @property
    def total(self) -> int:
        """The sum of all parts: the peak."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Planned:
    """How a training would run: its memory, how passes are made to fit, the cost of its largest pass; `stored`: bytes
    of the frozen layers' output that it stores on disk. `unknown`: the reason why the cost, and with it activations,
    logits and time, cannot be estimated; they are 0 then."""

    memory: Memory
    fit: Fit
    largest: Pass
    cost: Footprint
    fits: bool
    stored: int = 0
    unknown: str | None = None


def plan_training(
    model: PreTrainedModel,
    shape: TrainingShape,
    batches: Batches,
    train: Train,
    by_rows: bool,
    free: int,
    loaded: bool = False,
    under: int = 0,
) -> Planned:
    """Choose how passes run: as planned if that fits into `free` bytes, else with activations recomputed (on a GPU, or
    if `train.micro_batch` is auto; never if `train.gradient_checkpointing` is false) and, if `micro_batch` is auto, in
    parts. If the cost cannot be estimated, in the way that needs the least memory.

    `model` has no weights. `loaded`: the real ones are in memory already, and need no more of it. `under`: the number
    of values in frozen adapters under the trained one.
    """
    padded = not (batches.packed or by_rows)
    ways, unknown = _ways(batches, train, padded, shape.device), None
    for fit in ways:
        largest = _largest(batches, fit.limit, padded, by_rows)
        with_fit = replace(shape, checkpointing=fit.recompute)
        try:
            cost = footprint(model, with_fit, largest)
        except Exception as error:  # a family's code may need data, such as the output of a router, to run at all
            family = model.config.get_text_config().model_type
            unknown = f"{family} cannot be run without weights ({short(error, 80)})"
            if isinstance(error, QcftError):  # a library has changed
                unknown = error.message
            cost, fit, largest = NOTHING, ways[-1], _largest(batches, ways[-1].limit, padded, by_rows)
        memory = _memory(model, with_fit, train, cost, under)
        held = memory.weights + memory.constants + memory.halves + memory.file + memory.adapters if loaded else 0
        planned = Planned(memory, fit, largest, cost, memory.total - held <= ROOM * free, unknown=unknown)
        if planned.fits or unknown:
            break
    return planned


def _ways(batches: Batches, train: Train, padded: bool, device: str) -> list[Fit]:
    """Ways to run the passes, from the fastest to the one that needs the least memory."""
    asked = train.gradient_checkpointing
    recompute = device != "cpu" if asked == "auto" else asked
    ways = [Fit(None, False)] if not recompute or asked == "auto" else []
    if recompute:
        ways.append(Fit(None, True))
    if train.micro_batch == "auto":
        if asked == "auto" and not recompute:
            ways.append(Fit(None, True))
        longest = max(len(row.input_ids) for item in batches.items for row in item)
        limit = _largest(batches, None, padded, False).tokens // 2
        while limit >= longest:
            ways.append(Fit(limit, ways[-1].recompute))
            limit //= 2
        ways.append(Fit(longest, ways[-1].recompute))
    return ways


def _largest(batches: Batches, limit: int | None, padded: bool, by_rows: bool) -> Pass:
    """The pass with the most tokens, with the highest number of answer tokens of any pass."""
    found: list[Pass] = []
    for i in range(0, len(batches.items), batches.per_pass):
        rows = [row for item in batches.items[i : i + batches.per_pass] for row in item]
        found += [_as_pass(part, padded, by_rows) for part in divided(rows, limit, padded)]
    most = max(found, key=lambda one: one.tokens)
    return Pass(most.lengths, max(one.answers for one in found), padded, by_rows)


def _as_pass(rows: Sequence[EncodedRow], padded: bool, by_rows: bool) -> Pass:
    lengths = tuple(len(row.input_ids) for row in rows)
    return Pass(lengths, sum(row.answer_tokens for row in rows), padded, by_rows)


def _memory(model: PreTrainedModel, shape: TrainingShape, train: Train, cost: Footprint, under: int) -> Memory:
    below = lowest_adapted(model, list(shape.modules))
    layers: Any = model.get_submodule(decoder_layers(model)[0])
    gone = tuple(layers[:below]) if shape.cut else ()
    weights = weight_bytes(model, shape.quantize, gone)
    by_name = {module.name: module.shape for module in linear_modules(model)}
    trained = sum(trained_numbers(shape.lora, name, by_name[name]) for name in shape.modules)
    mapped = HALF * 2 * weight_bytes(model, shape.quantize).packed if shape.device == "cpu" else 0
    return Memory(
        weights=weights.packed,
        constants=weights.constants,
        halves=weights.linear + weights.embeddings + weights.other,
        file=mapped,
        adapters=FULL * trained * (2 if shape.second and shape.second.copied else 1) + HALF * under,
        gradients=FULL * trained,
        optimizer=round(STATES.get(optimizer_for(train, shape.device), ADAMW) * trained),
        activations=round(max(cost.activations - cost.logits, 0)),
        logits=round(min(cost.logits, cost.activations)),
        kept=KEPT if shape.device == "cpu" else 0,
    )
