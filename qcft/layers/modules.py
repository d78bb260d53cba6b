"""Finding a model's decoder layers and linear modules from the model itself, not from a list of names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qcft.errors import InputError, nearest
from qcft.recipe import frozen_layers, parse_freeze

if TYPE_CHECKING:
    from torch import nn


def decoder_layers(model: nn.Module) -> tuple[str, int]:
    """The path of a causal LM's list of decoder layers, and its length.

    It is the one nn.ModuleList as long as the config's number of hidden layers. Raises InputError when
    there is none.
    """
    from torch import nn

    config: Any = model.config
    wanted = config.get_text_config().num_hidden_layers
    found = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == wanted
    ]
    if not found:
        raise InputError(
            f"model: no list of its {wanted} decoder layers was found in {type(model).__name__}",
            "freezing and adapters need a decoder-only model with one list of layers",
        )
    return min(found, key=len), wanted


def adapted_modules(model: nn.Module, targets: str | list[str], freeze: str, seed: int) -> list[str]:
    """Full names of the linear modules that get an adapter: those of the layers that are not frozen.

    `targets` is `all-linear` or a list of last names (`q_proj`). The output head is never among them.
    Raises InputError for a spec the model has no layers for, a target it lacks, or nothing left to train.
    """
    prefix, layers = decoder_layers(model)
    frozen = frozen_layers(parse_freeze(freeze), layers, seed)
    linear = _linear_modules(model, prefix)
    if not linear:
        raise InputError(
            f"model: the layers of {type(model).__name__} hold no linear modules",
            "models built of other modules, such as GPT-2's, can't be adapted",
        )
    if targets != "all-linear":
        known = sorted({name.rsplit(".", 1)[-1] for name in linear})
        for target in targets:
            if target not in known:
                raise InputError(
                    f"lora.targets: the model has no linear module {target!r}",
                    nearest(target, known) + f"it has {', '.join(known)}",
                )
        linear = [name for name in linear if name.rsplit(".", 1)[-1] in targets]
    chosen = [name for name in linear if int(name[len(prefix) + 1 :].split(".")[0]) not in frozen]
    if not chosen:
        raise InputError(f"freeze: {freeze!r} leaves nothing to train", "freeze fewer layers or name more lora.targets")
    return chosen


def _linear_modules(model: nn.Module, prefix: str) -> list[str]:
    from torch import nn

    return [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n.startswith(prefix + ".")]
