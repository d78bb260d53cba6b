"""The memory that weights need, from a model's shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcft.private import private

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

BLOCK, OUTER_BLOCK = 64, 256  # weights that share a quantization constant; constants that share a second one
HALF = 2  # bytes of a weight in 16 bits


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a loaded model by part: 4-bit weights, their quantization constants, and what stays in 16 bits."""

    packed: int
    constants: int
    linear: int
    embeddings: int
    other: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.packed + self.constants + self.linear + self.embeddings + self.other


def nf4_bytes(weights: int) -> tuple[int, int]:
    """Bytes of a matrix of `weights` numbers in NF4 with double quantisation, and of its quantization constants.

    QLoRA (Dettmers et al. 2023, arXiv 2305.14314): 4 bits per weight, 8 for each 64 weights, 32 for each 256 of those;
    bitsandbytes also stores two tables of levels (16 and 256 floats) and an offset with each matrix.
    """
    inner = -(-weights // BLOCK)
    outer = -(-inner // OUTER_BLOCK)
    return -(-weights // 2), inner + 4 * outer + 4 * (16 + 256 + 1)


def quantised_modules(model: PreTrainedModel) -> list[str]:
    """Full names of the modules that transformers quantises when it loads a model in 4 bits: nn.Linear but none of its
    subclasses, without the output head. The model has no weights, or holds them in 16 bits."""
    from torch import nn

    left = private("transformers.quantizers.base:get_keys_to_not_convert")(model)
    converts = private("transformers.quantizers.quantizers_utils:should_convert_module")
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and converts(name, left)]


def quantised_share(model: PreTrainedModel) -> float:
    """The share of a model's weights that loading in 4 bits quantises, not counting embeddings and head."""
    return share_of_weights(model, quantised_modules(model))


def share_of_weights(model: PreTrainedModel, modules: list[str]) -> float:
    """The share of a model's weights that these linear modules hold, not counting embeddings and head."""
    ends = {id(one) for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None}
    outside = {id(part) for module in model.modules() if id(module) in ends for part in module.parameters()}
    total = sum(weight.numel() for weight in model.parameters() if id(weight) not in outside)
    own = sum(int(model.get_submodule(name).weight.numel()) for name in modules)
    return own / max(1, int(total))


def weight_bytes(model: PreTrainedModel, quantize: str, without: tuple[nn.Module, ...] = ()) -> WeightBytes:
    """The memory of a model's weights once loaded; `without`: modules that are not loaded."""
    quantised = {id(model.get_submodule(name)) for name in quantised_modules(model)}
    ends = {id(one) for one in (model.get_input_embeddings(), model.get_output_embeddings())}
    gone = {id(part) for module in without for part in module.modules()}
    seen: set[int] = set()
    packed = constants = linear = embeddings = other = 0
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) in seen or id(module) in gone:
                continue
            seen.add(id(weight))
            count = weight.numel()
            if id(module) in quantised and name == "weight":
                if quantize == "nf4":
                    four, more = nf4_bytes(count)
                    packed, constants = packed + four, constants + more
                else:
                    linear += HALF * count
            elif id(module) in ends:
                embeddings += HALF * count
            else:
                other += HALF * count
    return WeightBytes(packed, constants, linear, embeddings, other)
