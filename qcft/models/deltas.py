"""The weights that an adapter changes, and how: LoRA and DoRA factors, embeddings, biases, whole modules.

Each change is a pure function of (weight, factors) in fp32, and equal to PEFT's own merge where PEFT has one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qcft.errors import InputError, QcftError
from qcft.files import read_json
from qcft.models.adapter_config import CONFIG, PREFIX, WEIGHTS, check_mergeable
from qcft.models.tensors import StoredTensor, stored_tensors
from qcft.private import private

if TYPE_CHECKING:
    import torch


Scale = float | Callable[[str], float]  # one for the whole delta, or one for each weight by its full name

# A factor's name: the module it belongs to, and which factor it is.
FACTOR = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?:\.(weight|bias))?"
)


@dataclass
class WeightChange:
    """How one weight is changed. `magnitude` is DoRA's, `bias` the bias of a B factor; `value` replaces the weight."""

    a: StoredTensor | None = None
    b: StoredTensor | None = None
    embedding: bool = False
    magnitude: StoredTensor | None = None
    bias: StoredTensor | None = None
    value: StoredTensor | None = None
    scale: float = 0.0

    @property
    def plain(self) -> bool:
        """Whether it is exactly W + s B A, so that it can be scaled or be part of a stack."""
        return self.a is not None and self.magnitude is None and self.value is None

    def shape(self) -> tuple[int, ...]:
        """The shape of the weight it was made for; a Conv1D's is transposed."""
        if self.a is not None and self.b is not None:
            rows, columns = self.b.shape[0], self.a.shape[1]
            return (columns, rows) if self.embedding else (rows, columns)
        only = self.value or self.bias
        assert only is not None
        return only.shape


@dataclass
class AdapterChanges:
    """An adapter's changes, by weight name."""

    folder: Path
    changes: dict[str, WeightChange] = field(default_factory=dict)
    transposed: bool = False
    biases: str = "none"

    @property
    def plain(self) -> bool:
        """Whether all its changes are W + s B A."""
        return all(change.plain for change in self.changes.values())


def read_adapter(folder: Path, scale: Scale = 1.0) -> AdapterChanges:
    """Read an adapter's changes, multiplied by `scale`. Raises InputError, naming the part that qcft cannot merge."""
    config = read_json(folder / CONFIG)
    check_mergeable(config, str(folder))
    adapter = AdapterChanges(folder, transposed=bool(config.get("fan_in_fan_out")), biases=config.get("bias", "none"))
    for name, stored in stored_tensors(folder / WEIGHTS).items():
        plain = name.removeprefix(PREFIX)
        found = FACTOR.fullmatch(plain)
        if found is None:
            if "lora_" in plain or "token_adapter" in plain:
                raise _foreign(folder, name)
            weight = plain.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            adapter.changes.setdefault(weight, WeightChange()).value = stored
            continue
        module, factor, kind = found.groups()
        if factor == "lora_B" and kind == "bias":
            adapter.changes.setdefault(f"{module}.bias", WeightChange()).bias = stored
            continue
        change = adapter.changes.setdefault(f"{module}.weight", WeightChange())
        if factor == "lora_magnitude_vector":
            change.magnitude = stored
        elif len(stored.shape) != 2:
            raise _foreign(folder, name)
        elif factor.endswith("A"):
            change.a, change.embedding = stored, "embedding" in factor
        else:
            change.b, change.embedding = stored, "embedding" in factor
    for weight, change in adapter.changes.items():
        if (change.a is None) != (change.b is None) or (change.magnitude is not None and change.a is None):
            left = change.a or change.b
            names = [n for n, s in stored_tensors(folder / WEIGHTS).items() if s == (left or change.magnitude)]
            raise _foreign(folder, names[0])
        if config.get("use_dora") and change.a is not None and change.magnitude is None:
            raise InputError(f"adapter: {str(folder)!r} is DoRA without magnitudes ({weight})", "save it again")
        if change.embedding and change.magnitude is not None:
            raise InputError(
                f"adapter: {str(folder)!r} holds DoRA on the embeddings ({weight}), which qcft cannot merge",
                "merge it with PEFT first",
            )
        module = weight.rpartition(".")[0]
        rank = adapter.changes.get(f"{module}.weight", change).a
        if rank is not None:
            change.scale = scale_of(scale, weight) * _scaling(config, module, rank.shape[0])
            if not math.isfinite(change.scale):
                raise InputError(f"adapter: {str(folder)!r} has no finite lora_alpha ({weight})", "correct its config")
    if scale != 1 and not adapter.plain:
        raise InputError(
            f"adapter: {str(folder)!r} holds more than plain LoRA ({_odd(adapter)}), which cannot be scaled",
            "merge it without a scale",
        )
    return adapter


def check_biases(adapter: AdapterChanges, weights: Container[str]) -> None:
    """Refuse an adapter whose modules' biases were trained but are not in its files: PEFT before 0.21 did not save them
    with `bias: lora_only`. `weights` are the model's. Raises InputError."""
    if adapter.biases == "none":
        return
    for name, change in adapter.changes.items():
        bias = f"{name.removesuffix('weight')}bias"
        if change.a is not None and bias in weights and bias not in adapter.changes:
            raise InputError(
                f"adapter: {str(adapter.folder)!r} trained biases (bias: {adapter.biases}) but does not hold {bias}",
                "save it again with PEFT 0.21 or later, which saves them",
            )


class Delta:
    """A change with its factors in memory, to be added to a weight one block of rows at a time.

    W + s B A; DoRA's m (W + s B A) / ||W + s B A||, norms over each output's row (arXiv 2402.09353, eq. 5);
    an embedding's W + s (B A)^T; a bias's b + s b_B; or what replaces the weight.
    """

    def __init__(self, change: WeightChange, shape: tuple[int, ...], transposed: bool) -> None:
        self.value = next(change.value.blocks(None)) if change.value else None
        self.bias = _fp32(change.bias) * change.scale if change.bias else None
        self.magnitude = _fp32(change.magnitude) if change.magnitude else None
        self.left: torch.Tensor | None = None
        self.product: torch.Tensor | None = None
        self.flipped = False
        if change.a is not None and change.b is not None:
            a, b = _fp32(change.a), _fp32(change.b)
            # A square Conv1D is recognised by the adapter's flag, any other by its shape.
            self.flipped = change.embedding or (transposed and shape == (a.shape[1], b.shape[0]))
            self.left, self.right = (a.T * change.scale, b.T) if self.flipped else (b * change.scale, a)

    @property
    def whole(self) -> bool:
        """Whether all rows are needed at once: for DoRA's norms on a transposed weight."""
        return self.magnitude is not None and self.flipped

    def onto(self, block: torch.Tensor, first: int) -> torch.Tensor:
        """Rows `first`... of the weight, in fp32, with the change."""
        import torch

        if self.value is not None:
            block = self.value[first : first + len(block)].to(torch.float32)
        if self.bias is not None:
            return block + self.bias
        if self.left is None:
            return block
        if self.product is None or len(self.product) < len(block):
            self.product = torch.empty_like(block)  # reused: new memory pages for each block cost more than the product
        block.add_(torch.mm(self.left[first : first + len(block)], self.right, out=self.product[: len(block)]))
        if self.magnitude is None:
            return block
        norms = torch.linalg.vector_norm(block, dim=0 if self.flipped else 1, keepdim=True)
        magnitude = self.magnitude.flatten()
        if not self.flipped:
            magnitude = magnitude[first : first + len(block)]
        return block.mul_(magnitude.reshape(norms.shape) / norms)


def scale_of(scale: Scale, weight: str) -> float:
    """The scale of one weight's delta."""
    return scale(weight) if callable(scale) else scale


UNMEASURED = "use a freeze spec that does not depend on what it changed, such as snr:0.5 or layers:0-11"


def check_factors(adapter: AdapterChanges, hint: str = UNMEASURED) -> None:
    """Check that all changes of an adapter are s B A on linear layers. Raises InputError."""
    for weight, change in adapter.changes.items():
        if not change.plain or change.embedding or change.b is None:
            raise InputError(
                f"adapter: {str(adapter.folder)!r} holds more than plain LoRA ({weight}), "
                "whose change is not a product of two factors",
                hint,
            )


def check_stack(adapters: list[AdapterChanges], hint: str = "start the next phase merged") -> None:
    """Check that adapters can be stacked. Raises InputError."""
    for adapter in adapters if len(adapters) > 1 else []:
        if not adapter.plain:
            raise InputError(
                f"adapter: {str(adapter.folder)!r} holds more than plain LoRA ({_odd(adapter)}), "
                "which cannot be part of a stack",
                hint,
            )


def check_shape(name: str, change: WeightChange, shape: tuple[int, ...], transposed: bool) -> None:
    """Check that a change fits the weight. Raises QcftError."""
    wanted = change.shape()
    if wanted == shape or (transposed and change.a is not None and wanted[::-1] == shape):
        return
    raise QcftError(
        f"the adapter's delta for {name} is {' x '.join(map(str, wanted))}, the weight {' x '.join(map(str, shape))}",
        "the adapter was made for another model, or another vocabulary",
    )


def _fp32(stored: StoredTensor) -> torch.Tensor:
    import torch

    return stored.read().to(torch.float32)


def _scaling(config: dict[str, object], module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA, and the patterns that override either for some modules."""
    pattern_key = private("peft.utils.other:get_pattern_key")
    patterns = config.get("alpha_pattern") or {}
    assert isinstance(patterns, dict)
    alpha = float(patterns.get(pattern_key(list(patterns), module), config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _odd(adapter: AdapterChanges) -> str:
    return next(name for name, change in adapter.changes.items() if not change.plain)


def _foreign(folder: Path, name: str) -> InputError:
    return InputError(
        f"adapter: {str(folder)!r} holds {name!r}, which is not a LoRA factor of a linear layer or an embedding",
        "merge it with PEFT first",
    )
