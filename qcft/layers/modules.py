"""Finding a model's decoder layers and linear modules from the model itself, not from a list of names."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcft.errors import InputError, nearest
from qcft.recipe import ByLayer, FreezeSpec, Phase, Recipe, frozen_layers, frozen_modules

if TYPE_CHECKING:
    from torch import nn


ROUTER = re.compile(r"\b(router|gate|gating|shared_expert_gate)\b")


@dataclass(frozen=True)
class LinearModule:
    """One linear module of a decoder layer: its full name, its layer, its type (`self_attn.q_proj`)."""

    name: str
    layer: int
    type: str
    shape: tuple[int, int]


def decoder_layers(model: nn.Module) -> tuple[str, int]:
    """The path of a causal LM's list of decoder layers, and its length.

    It is the one nn.ModuleList as long as the config's number of hidden layers; of several, as a wrapper's image or
    audio encoder may have another, that in the language model. Raises InputError when there is none.
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
    decoder: Any = getattr(model, "get_decoder", None)
    path = _path_of(model, decoder()) if decoder else ""
    inside = [name for name in found if not path or name.startswith(f"{path}.")]
    return min(inside or found, key=len), wanted


def layer_of(model: nn.Module) -> Callable[[str], int | None]:
    """The decoder layer of a module, or of a weight, by its full name; None for what is outside the layers."""
    prefix, _ = decoder_layers(model)
    inside = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")

    def found(name: str) -> int | None:
        match = inside.match(name)
        return int(match[1]) if match else None

    return found


def scales_by_layer(model: nn.Module, by: ByLayer) -> Callable[[str], float]:
    """The scale of a module's delta, or of a weight's, by its full name."""
    layer = layer_of(model)
    return lambda name: by.scale(layer(name))


def _path_of(model: nn.Module, part: Any) -> str:
    """The path of a module in a model; empty for the model itself, and for what is not one of its modules."""
    return next((name for name, module in model.named_modules() if module is part), "")


def linear_modules(model: nn.Module, targets: str | list[str] = "all-linear") -> list[LinearModule]:
    """The linear modules of the decoder layers that `targets` names, layer by layer.

    `targets` is `all-linear` or a list of last names (`q_proj`). The output head is never among them, nor are
    routers of experts, nor what cannot carry an adapter (see `_bypassed`).
    Raises InputError for a target the model lacks, and for a model without linear modules.
    """
    from torch import nn

    prefix, _ = decoder_layers(model)
    experts = _expert_counts(model)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(prefix + "."):
            if _is_router(name, module.out_features, experts) or _bypassed(model, name):
                continue
            layer, _, kind = name[len(prefix) + 1 :].partition(".")
            found.append(LinearModule(name, int(layer), kind, (module.out_features, module.in_features)))
    if not found:
        raise InputError(
            f"model: the layers of {type(model).__name__} hold no linear modules",
            "models built from other modules, such as GPT-2's, cannot have adapters",
        )
    if targets == "all-linear":
        return found
    known = sorted({module.name.rsplit(".", 1)[-1] for module in found})
    for target in targets:
        if target not in known:
            raise InputError(
                f"lora.targets: the model has no linear module {target!r}",
                nearest(target, known) + f"it has {', '.join(known)}",
            )
    return [module for module in found if module.name.rsplit(".", 1)[-1] in targets]


def _expert_counts(model: nn.Module) -> set[int]:
    """The numbers of experts in the model's config."""
    config: Any = model.config
    keys = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    counts = [getattr(config.get_text_config(), key, None) for key in keys]
    return {count for count in counts if isinstance(count, int)}


def _is_router(name: str, outputs: int, experts: set[int]) -> bool:
    """Whether a linear module chooses experts, or weighs one that all tokens share; training must not change those."""
    return bool(experts) and outputs in experts | {1} and ROUTER.search(name) is not None


def _bypassed(model: nn.Module, name: str) -> bool:
    """Whether a module's weight is used without calling it: fused kernels of Mamba's mixers do that with their output
    projection, so an adapter on it would do nothing."""
    parent, _, last = name.rpartition(".")
    return last == "out_proj" and hasattr(model.get_submodule(parent), "ssm_state_size")


def adapted_modules(
    model: nn.Module,
    targets: str | list[str],
    freeze: FreezeSpec,
    seed: int,
    measured: Mapping[str, float] | None = None,
) -> list[str]:
    """Full names of the linear modules that get an adapter: those that are not frozen.

    `measured` gives for each module what the spec depends on: its change in phase 1, or its signal-to-noise ratio.
    Without it the right number of modules is chosen, but not yet the right ones. Raises InputError for a spec the
    model has no layers for, a target it lacks, or nothing left to train.
    """
    _, layers = decoder_layers(model)
    modules = linear_modules(model, targets)
    values = {module.name: (measured or {}).get(module.name, 0.0) for module in modules}
    if freeze.kind == "snr":
        frozen = frozen_modules(freeze, values, {module.name: module.type for module in modules})
        return [module.name for module in modules if module.name not in frozen]
    change = [sum(values[module.name] for module in modules if module.layer == i) for i in range(layers)]
    out = frozen_layers(freeze, layers, seed, change)
    chosen = [module.name for module in modules if module.layer not in out]
    if not chosen:
        raise InputError(
            f"freeze: {freeze.text!r} leaves nothing to train", "freeze fewer layers or name more lora.targets"
        )
    return chosen


def adapted_in(
    model: nn.Module, recipe: Recipe, phase: Phase, measured: Mapping[str, float] | None = None
) -> list[str]:
    """`adapted_modules` of a recipe's phase."""
    return adapted_modules(model, recipe.lora.targets, phase.freeze, recipe.seed, measured)


def frozen_whole(model: nn.Module, adapted: list[str]) -> list[int]:
    """The layers none of whose modules is among `adapted`."""
    prefix, layers = decoder_layers(model)
    free = {int(name[len(prefix) + 1 :].split(".")[0]) for name in adapted}
    return [i for i in range(layers) if i not in free]


def frozen_in_words(model: nn.Module, targets: str | list[str], adapted: list[str]) -> str:
    """What has no adapter: `layers 0-3, 7`, and for layers frozen in part how many modules."""
    whole = frozen_whole(model, adapted)
    left = {module.name: module.layer for module in linear_modules(model, targets)}
    parts = sum(name not in adapted and layer not in whole for name, layer in left.items())
    words = []
    if whole:
        words.append(f"layers {_ranges(whole)}" if len(whole) > 1 else f"layer {whole[0]}")
    if parts:
        words.append(f"{parts} of {len(left)} modules" + (" in other layers" if whole else ""))
    return " and ".join(words) or "nothing"


def _ranges(numbers: list[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def lowest_adapted(model: nn.Module, adapted: list[str]) -> int:
    """The lowest layer with an adapter: as many layers below it do not change in training."""
    prefix, _ = decoder_layers(model)
    return min(int(name[len(prefix) + 1 :].split(".")[0]) for name in adapted)
