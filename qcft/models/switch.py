"""One load of a model's weights that stands for many stages: adapters are switched, not reloaded."""

from __future__ import annotations

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
    """Whether adapters leave the weights under them as they were once they are switched off: LoRA does, unless
    biases were trained with it."""
    return all((read_json(folder / CONFIG) or {}).get("bias", "none") == "none" for folder in folders)


class Switched:
    """A loaded model whose adapters are switched on and off; `model` is the model itself, adapters inside it.

    It is put into evaluation mode, and, as bitsandbytes repacks 4-bit weights in the first forward pass of that mode
    on some CPUs, such a pass is done at once, and again where adapters were loaded: PEFT asks for the model's state
    dict then, for which they are unpacked. So every number comes from the same kernels, in whatever order stages and
    tasks are evaluated. It must not be trained any more.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._adapted: Any = None
        self._names: dict[Path, str] = {}
        self._settle()

    def _settle(self) -> None:
        import torch

        self.model.eval()  # what was loaded since came in training mode
        with torch.no_grad():
            self.model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=self.model.device))

    def use(self, stack: Sequence[Path]) -> None:
        """Make exactly these adapters live, the lowest first; none of them: the bare weights."""
        from peft import PeftModel

        for folder in stack:
            if folder not in self._names:
                name = f"a{len(self._names)}"
                if self._adapted is None:
                    self._adapted = PeftModel.from_pretrained(
                        self.model, str(folder), adapter_name=name, is_trainable=False, use_safetensors=True
                    )
                else:
                    self._adapted.load_adapter(str(folder), adapter_name=name, is_trainable=False, use_safetensors=True)
                self._names[folder] = name
        if self._adapted is None:
            return
        if stack:
            self._adapted.base_model.enable_adapter_layers()
            names = [self._names[folder] for folder in stack]
            self._adapted.base_model.set_adapter(names if len(names) > 1 else names[0])
        else:
            self._adapted.base_model.disable_adapter_layers()
        self._settle()


class Stacks:
    """A model with the plain LoRA adapters of several stacks on it, one stack live at a time."""

    def __init__(self, model: PreTrainedModel, stacks: Sequence[Sequence[Path]]) -> None:
        folders = list(dict.fromkeys(folder for stack in stacks for folder in stack))
        self._names = {folder: f"adapter{i}" for i, folder in enumerate(folders)}
        self.model: Any = load_on(model, folders, list(self._names.values())) if folders else model
        self.base: PreTrainedModel = model

    @contextmanager
    def live(self, stack: Sequence[Path]) -> Iterator[PreTrainedModel]:
        """The model with one stack live, none under it being trained."""
        if not self._names:
            yield self.model
        elif not stack:
            with self.model.disable_adapter():
                yield self.model
        else:
            self.model.base_model.set_adapter([self._names[folder] for folder in stack])
            yield self.model
