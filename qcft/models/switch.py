"""One load of a model's weights for many stages: adapters are switched, not reloaded."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.files import read_json
from qcft.models.adapter_config import CONFIG
from qcft.models.adapters import load_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def can_switch(folders: Sequence[Path]) -> bool:
    """Whether the weights are unchanged once these adapters are switched off: true for LoRA, unless biases were trained
    with it."""
    return all((read_json(folder / CONFIG) or {}).get("bias", "none") == "none" for folder in folders)


def reads_weights(folders: Sequence[Path]) -> bool:
    """Whether an adapter's forward pass reads the 4-bit weights, which must not be packed then: DoRA needs their
    norms."""
    return any((read_json(folder / CONFIG) or {}).get("use_dora") for folder in folders)


class Adapters:
    """A loaded model whose adapters are switched on and off; `model` is the model itself, with the adapters inside."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._adapted: Any = model
        self._names: dict[Path, str] = {}

    def use(self, stack: Sequence[Path]) -> PreTrainedModel:
        """The model with exactly these adapters active, the lowest first; with none: the base weights alone."""
        new = [folder for folder in dict.fromkeys(stack) if folder not in self._names]
        names = [f"a{len(self._names) + i}" for i in range(len(new))]
        with _packed(self.model):
            self._adapted = load_on(self._adapted, new, names)
        self._names.update(zip(new, names, strict=True))
        if stack:
            self._adapted.base_model.enable_adapter_layers()
            live = [self._names[folder] for folder in stack]
            self._adapted.base_model.set_adapter(live if len(live) > 1 else live[0])
        elif self._names:
            self._adapted.base_model.disable_adapter_layers()
        return self.model


@contextmanager
def _packed(model: PreTrainedModel) -> Iterator[None]:
    """Keep packed 4-bit weights bit for bit.

    On some CPUs bitsandbytes packs them in the first forward pass in evaluation mode. When an adapter is loaded, PEFT
    asks for the model's state dict, for which they are unpacked; packing them again gives different numbers.
    """
    import bitsandbytes as bnb

    layers = [layer for layer in model.modules() if isinstance(layer, bnb.nn.Linear4bit)]
    packed = [
        (layer, layer.weight.data, copy.copy(layer.weight.quant_state))
        for layer in layers
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    ]
    try:
        yield
    finally:
        for layer, data, state in packed:
            layer.weight.data = data
            layer.weight.quant_state = layer.quant_state = state


def _can_be_packed(layer: Any) -> bool:
    """Whether bitsandbytes can pack this layer's weights: it packs 32 rows at once, and whole blocks of each row."""
    return bool(layer.out_features % 32 == 0 and layer.in_features % layer.weight.blocksize == 0)


class Switched(Adapters):
    """`Adapters` of a model that is evaluated.

    The model is put into evaluation mode, and one forward pass is run at once, because on some CPUs bitsandbytes packs
    4-bit weights in the first pass of that mode. So all results come from the same kernels and the same weights, in
    whatever order stages and tasks are evaluated. The model must not be trained afterwards. `packed`: False if an
    adapter reads the weights (see `reads_weights`), as PEFT would misread packed ones.
    """

    def __init__(self, model: PreTrainedModel, packed: bool = True) -> None:
        import bitsandbytes as bnb
        import torch

        super().__init__(model)
        for layer in model.modules():
            if isinstance(layer, bnb.nn.Linear4bit) and not (packed and _can_be_packed(layer)):
                layer.support_avx512bf16_for_cpu = False
        model.eval()
        with torch.no_grad():
            model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))

    def use(self, stack: Sequence[Path]) -> PreTrainedModel:
        """The model with these adapters active, ready to be evaluated."""
        super().use(stack)
        self.model.eval()  # newly loaded adapters are in training mode
        return self.model
