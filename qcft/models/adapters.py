"""LoRA adapters: adding them to modules, loading, stacking, combining and saving them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.errors import InputError, QcftError, short
from qcft.files import read_json, write_json
from qcft.models.adapter_config import CONFIG, PREFIX, WEIGHTS
from qcft.models.deltas import UNMEASURED, Scale, check_factors, read_adapter, scale_of
from qcft.private import of, private
from qcft.recipe import Lora
from qcft.recipe.goal import METHODS

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

COMBINED = "combined"
ACTIVE = "peft:BaseTunerLayer._active_adapter"
TOP, UNDER = "default", "under"  # PEFT's names for the adapter that is (or was last) trained, and for those below it
START = "start"  # the name of a frozen copy of the trained adapter from before the phase


def add_lora(model: PreTrainedModel, modules: list[str], lora: Lora) -> PeftModel:
    """Add new adapters to exactly `modules` (full names) and freeze the rest."""
    from peft import get_peft_model

    adapted = get_peft_model(model, _config(modules, lora))
    found = {name for name, _ in lora_layers(adapted)}
    if found != set(modules):
        raise QcftError(f"adapters went onto {len(found)} modules instead of {len(modules)}", "please report this")
    return adapted


def check_adaptable(model: PreTrainedModel, modules: list[str], lora: Lora) -> None:
    """Add adapters to a copy of a model without weights, to check that PEFT puts them on these modules.

    Raises InputError, naming the family, if it does not: PEFT refuses some modules, and in some mixture-of-experts
    families it confuses the experts with linear modules of the same last name.
    """
    from peft import get_peft_model

    family = model.config.get_text_config().model_type
    hint = 'name other modules, such as --set "lora.targets=[q_proj, k_proj, v_proj, o_proj]", or use another model'
    try:
        adapted = get_peft_model(copy.deepcopy(model), _config(modules, lora))
    except Exception as error:  # a family's own code, or PEFT's checks, may raise anything
        raise InputError(f"model: adapters cannot be added to {family}: {short(error)}", hint) from None
    lost = sorted(set(modules) - {name for name, _ in lora_layers(adapted)})
    if lost:
        raise InputError(
            f"model: PEFT puts adapters that are meant for linear modules of {family}, such as {lost[0]}, onto its "
            "experts, which qcft does not train",
            hint,
        )


def _config(modules: list[str], lora: Lora) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules,
        use_rslora=lora.rslora,
        **(lora.peft.given() or {}),
        bias="none",
        task_type="CAUSAL_LM",
    )


def trained_numbers(lora: Lora, module: str, shape: tuple[int, int]) -> int:
    """The number of values in a module's adapter: its two factors, and DoRA's magnitudes or B's bias.

    `shape`: of the module's weight (out, in).
    """
    more = shape[0] if lora.peft.beyond_factors else 0
    return rank_of(lora, module) * sum(shape) + more


def rank_of(lora: Lora, module: str) -> int:
    """The rank of a module's adapter, by the module's full name."""
    if not (patterns := lora.peft.rank_pattern):
        return lora.r
    key: str = private("peft.utils.other:get_pattern_key")(list(patterns), module)
    return patterns.get(key, lora.r)


def keep_adapters_in_fp32(model: PeftModel) -> None:
    """Keep trained adapters in fp32: in bf16, small optimizer updates would be lost in rounding."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """A model with a saved adapter active on it, not trainable."""
    return load_stack(model, [folder])


def load_stack(
    model: PreTrainedModel, folders: Sequence[Path], trainable: Collection[str] = (), copied: bool = False
) -> PeftModel:
    """A model with saved adapters stacked and active, the lowest first; all frozen, except for the top one's adapters
    on the modules `trainable` (full names). `copied`: also load a frozen copy of the top adapter, switched off."""
    names = [*(f"{UNDER}{i}" for i in range(len(folders) - 1)), TOP]
    adapted: PeftModel = load_on(model, folders, names)
    if copied:
        adapted = load_on(adapted, folders[-1:], [START])
    _activate(adapted, names)
    for name, parameter in adapted.named_parameters():
        module = name.removeprefix(PREFIX).partition(".lora_")[0]
        parameter.requires_grad = module in trainable and f".{TOP}" in name
    if trainable and not any(parameter.requires_grad for parameter in adapted.parameters()):
        raise InputError(
            "start: continue resumes an adapter that has none of the modules this phase trains",
            "freeze other layers, or use start: stacked",
        )
    return adapted


def add_lora_over(model: PreTrainedModel, under: Sequence[Path], modules: list[str], lora: Lora) -> PeftModel:
    """New adapters on exactly `modules`, over saved ones (the lowest first) that stay active and frozen."""
    if not under:
        return add_lora(model, modules, lora)
    names = [f"{UNDER}{i}" for i in range(len(under))]
    adapted: PeftModel = load_on(model, under, names)
    adapted.add_adapter(TOP, _config(modules, lora))
    _activate(adapted, [*names, TOP])
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad = f".{TOP}" in name and ".lora_" in name
    return adapted


def set_scale(model: PeftModel, scale: Scale) -> None:
    """Multiply the delta of the top adapter by `scale`, one number or one for each module by its full name; adapters
    under it stay unchanged."""
    for name, layer in lora_layers(model):
        layer.set_scale(TOP, scale_of(scale, name))


def combine_live(model: PeftModel, scale: float, method: str, density: float, seed: int, stack: int) -> str:
    """Combine the stack's adapters by one of PEFT's methods, the top one weighted by `scale`. Returns the name of the
    combination, which is then the only active adapter. Raises InputError for what PEFT cannot combine."""
    import torch

    names = [*(f"{UNDER}{i}" for i in range(stack - 1)), TOP]
    if COMBINED in model.peft_config:
        _activate(model, names)
        model.delete_adapter(COMBINED)
    torch.manual_seed(seed)  # dare drops at random
    weights = [*(1.0 for _ in names[:-1]), scale]
    try:
        model.add_weighted_adapter(names, weights, COMBINED, combination_type=method, density=density)
    except (ValueError, NotImplementedError) as error:
        by_svd = "svd" if method == "linear" else f"{method}_svd"
        other = f"use --method {by_svd} for adapters of different ranks, or " if by_svd in METHODS else ""
        raise InputError(
            f"dial: PEFT cannot combine the adapters by {method}: {short(error)}", f"{other}omit --method"
        ) from None
    model.set_adapter(COMBINED)
    for parameter in model.parameters():
        parameter.requires_grad = False
    return COMBINED


def read_trained(model: PeftModel, folder: Path) -> None:
    """Load a checkpoint's adapter into the one that is trained; adapters under it stay unchanged."""
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    result = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter_name=TOP)
    if result.unexpected_keys:
        raise QcftError(f"{folder.name} holds {result.unexpected_keys[0]}, which is not trained", "please report this")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's adapter, by the names of its weights in the trained model."""
    from safetensors.torch import load_file

    return {f"{name.removesuffix('weight')}{TOP}.weight": w for name, w in load_file(folder / WEIGHTS).items()}


def save_trained(model: PeftModel, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Save the trained adapter, without those under it: the same files from every process.

    `weights`: the whole weights by their names in the model, where each process holds a shard only.
    """
    model.create_or_update_model_card = _no_card
    model.save_pretrained(str(folder), selected_adapters=[TOP], save_embedding_layers=False, state_dict=weights)
    config = read_json(folder / CONFIG)
    if isinstance(config["target_modules"], list):  # a set in memory, whose order differs between processes
        config["target_modules"].sort()
    write_json(folder / CONFIG, config)


def _no_card(output_dir: str) -> None:
    """In place of PEFT's blank model card, which takes longer than saving a small adapter."""


def load_on(model: PreTrainedModel | PeftModel, folders: Sequence[Path], names: Sequence[str]) -> Any:
    """Load saved adapters onto a model under `names`, beside those it may have, not trainable; the caller decides which
    are active."""
    from peft import PeftModel

    adapted: Any = model
    for folder, name in zip(folders, names, strict=True):
        options: Any = {"adapter_name": name, "is_trainable": False, "use_safetensors": True}
        if isinstance(adapted, PeftModel):
            adapted.load_adapter(str(folder), **options)
        else:
            adapted = PeftModel.from_pretrained(adapted, str(folder), **options)
    return adapted


def _activate(adapted: PeftModel, names: Sequence[str]) -> None:
    """Activate all these adapters, the last one as PEFT's current adapter. Frozen ones get no dropout."""
    from torch import nn

    adapted.set_adapter(TOP)
    if len(names) > 1:
        adapted.base_model.set_adapter(list(names))
        for _, layer in lora_layers(adapted):
            for name in names[:-1]:
                if name in layer.lora_dropout:
                    layer.lora_dropout[name] = nn.Identity()


class AsBegun:
    """The model that a phase started from, as a state of the trained model: the trained adapter is off, or its frozen
    copy is on instead; adapters under it stay on."""

    def __init__(self, model: PeftModel) -> None:
        self._layers = [layer for _, layer in lora_layers(model)]
        self._live = [name for name in model.peft_config if name.startswith(UNDER) or name == START]

    @contextmanager
    def live(self) -> Iterator[None]:
        """Switch to the model that the phase started from. Unlike PEFT's own switches, this does not change which
        parameters are trainable."""
        before = [of(layer, ACTIVE) for layer in self._layers]
        try:
            for layer in self._layers:
                layer._active_adapter = self._live
            yield
        finally:
            for layer, names in zip(self._layers, before, strict=True):
                layer._active_adapter = names


def lora_factors(
    folder: Path, scale: Scale = 1.0, hint: str = UNMEASURED
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, float]]:
    """Each weight an adapter changes: its name, the factors A (r, in) and B (out, r), and the scale s of s B A: `scale`
    times the scale it was trained with.

    Raises InputError, with `hint`, for an adapter that holds anything except plain LoRA on linear layers.
    """
    adapter = read_adapter(folder, scale)
    check_factors(adapter, hint)
    for weight, change in adapter.changes.items():
        assert change.a is not None
        assert change.b is not None
        yield weight, change.a.read(), change.b.read(), change.scale


def lora_layers(model: PeftModel) -> list[tuple[str, Any]]:
    """The modules with adapters, by their names in the model."""
    from peft.tuners.lora import LoraLayer

    return [
        (name.removeprefix(PREFIX), module) for name, module in model.named_modules() if isinstance(module, LoraLayer)
    ]
