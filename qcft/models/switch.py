"""One load of a model's weights that stands for many stages: adapters are switched, not reloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.files import read_json
from qcft.models.adapter_config import CONFIG
from qcft.models.adapters import load_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def can_switch(folders: Sequence[Path]) -> bool:
    """Whether adapters leave the weights under them as they were once they are switched off: LoRA does, unless
    biases were trained with it."""
    return all((read_json(folder / CONFIG) or {}).get("bias", "none") == "none" for folder in folders)


class Adapters:
    """A loaded model whose adapters are switched on and off; `model` is the model itself, adapters inside it."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._adapted: Any = model
        self._names: dict[Path, str] = {}

    def use(self, stack: Sequence[Path]) -> PreTrainedModel:
        """The model with exactly these adapters live, the lowest first; none of them: the bare weights."""
        new = [folder for folder in dict.fromkeys(stack) if folder not in self._names]
        names = [f"a{len(self._names) + i}" for i in range(len(new))]
        self._adapted = load_on(self._adapted, new, names)
        self._names.update(zip(new, names, strict=True))
        if stack:
            self._adapted.base_model.enable_adapter_layers()
            live = [self._names[folder] for folder in stack]
            self._adapted.base_model.set_adapter(live if len(live) > 1 else live[0])
        elif self._names:
            self._adapted.base_model.disable_adapter_layers()
        return self.model


class Switched(Adapters):
    """`Adapters` of a model that is evaluated.

    It is put into evaluation mode, and, as bitsandbytes repacks 4-bit weights in the first forward pass of that mode
    on some CPUs, such a pass is done at once, and again where adapters were loaded: PEFT asks for the model's state
    dict then, for which they are unpacked. So every number comes from the same kernels, in whatever order stages and
    tasks are evaluated. It must not be trained any more.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._settle()

    def use(self, stack: Sequence[Path]) -> PreTrainedModel:
        """The model with these adapters live, ready to be evaluated."""
        super().use(stack)
        if self._names:
            self._settle()
        return self.model

    def _settle(self) -> None:
        import torch

        self.model.eval()  # what was loaded since came in training mode
        with torch.no_grad():
            self.model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self.model.device))
