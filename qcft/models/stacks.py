"""One load, several models: adapters on one base that are switched on and off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.models.adapters import load_on

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
