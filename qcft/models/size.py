"""What weights take, from a model's shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcft.private import private

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

BLOCK, OUTER_BLOCK = 64, 256  # weights that share a constant, constants that share one of their own
HALF = 2  # bytes of a weight in 16 bits


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a loaded model: what is in 4 bits, the constants of that, what stays in 16 bits, by part."""

    packed: int
    constants: int
    linear: int
    embeddings: int
    other: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.packed + self.constants + self.linear + self.embeddings + self.other


def nf4_bytes(weights: int) -> tuple[int, int]:
    """Bytes of a matrix of so many weights in NF4 with double quantisation, and of its constants.

    QLoRA (Dettmers et al. 2023, arXiv 2305.14314): 4 bits a weight, 8 for each 64 weights, 32 for each 256 of those;
    as bitsandbytes holds it each matrix also has both tables of levels (16 and 256 floats) and an offset.
    """
    inner = -(-weights // BLOCK)
    outer = -(-inner // OUTER_BLOCK)
    return -(-weights // 2), inner + 4 * outer + 4 * (16 + 256 + 1)


def quantised_modules(model: PreTrainedModel) -> list[str]:
    """Full names of the modules that loading in 4 bits quantises, by transformers' own choice: linear ones, and no
    subclasses of them, but for the output head. The model has no weights, or holds them in 16 bits."""
    from torch import nn

    left = private("transformers.quantizers.base:get_keys_to_not_convert")(model)
    converts = private("transformers.quantizers.quantizers_utils:should_convert_module")
    return [name for name, module in model.named_modules() if type(module) is nn.Linear and converts(name, left)]


def quantised_share(model: PreTrainedModel) -> float:
    """The share of a model's weights that loading in 4 bits quantises; embeddings and head not counted."""
    return share_of_weights(model, quantised_modules(model))


def share_of_weights(model: PreTrainedModel, modules: list[str]) -> float:
    """The share of a model's weights that are those of linear modules, by name; embeddings and head not counted."""
    ends = {id(one) for one in (model.get_input_embeddings(), model.get_output_embeddings()) if one is not None}
    outside = {id(part) for module in model.modules() if id(module) in ends for part in module.parameters()}
    total = sum(weight.numel() for weight in model.parameters() if id(weight) not in outside)
    own = sum(int(model.get_submodule(name).weight.numel()) for name in modules)
    return own / max(1, int(total))


def weight_bytes(model: PreTrainedModel, quantize: str, without: tuple[nn.Module, ...] = ()) -> WeightBytes:
    """What a model's weights take once loaded; `without`: modules that are not."""
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
