"""A recipe's model with its tokenizer and its modules; no data is read, and no weights before they are needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from qcft.data.encode import Encoder
from qcft.data.template import Template, Thinking
from qcft.events import Watch
from qcft.models.inputs import Inputs
from qcft.models.load import device
from qcft.models.meta import model_without_weights
from qcft.models.sources import ModelSource, described_folder, resolve, weights_folder
from qcft.recipe import Recipe
from qcft.training.settings import with_optimizers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


class PreparedModel:
    """A recipe with its model found. What recipes prepared one after the other with one `memo` share is made once."""

    def __init__(self, recipe: Recipe, watch: Watch, memo: dict[Any, Any] | None = None) -> None:
        self.recipe = recipe = with_optimizers(recipe, device())
        self.watch = watch
        self._memo: dict[Any, Any] = {} if memo is None else memo
        self.model: ModelSource = self._once(("model", recipe.model.model_dump_json()), lambda: resolve(recipe.model))

    @cached_property
    def inputs(self) -> Inputs:
        """The model's files, as they were when their digests were taken."""
        return Inputs([self.model])

    @cached_property
    def folder(self) -> Path:
        """The folder with the model's 16-bit weights; fetched or converted when first asked for."""
        return weights_folder(self.model, self.watch)

    @cached_property
    def described(self) -> Path:
        """A folder with the model's config and tokenizer, perhaps without its weights."""
        return self.__dict__.get("folder") or described_folder(self.model, self.watch)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with the recipe's chat template."""
        from qcft.models.load import load_tokenizer

        return self._once(
            ("tokenizer", self.recipe.model.model_dump_json()),
            lambda: load_tokenizer(self.described, self.recipe.model),
        )

    @cached_property
    def template(self) -> Template:
        """What the tokenizer's chat template makes of conversations."""
        model = self.recipe.model
        key = ("template", model.model_dump_json())
        return self._once(key, lambda: Template(self.tokenizer, model.special_tokens_in_text))

    @cached_property
    def meta_model(self) -> PreTrainedModel:
        """The model's modules without their weights."""
        return self._once(
            ("meta model", self.recipe.model.model_dump_json()),
            lambda: model_without_weights(self.described, self.recipe.model),
        )

    def encoder_for(
        self, system: str | None, max_length: int | None, long_rows: str, thinking: Thinking = "auto"
    ) -> Encoder:
        """The way from rows to tokens with the model's chat template."""
        return Encoder(self.tokenizer, system, max_length, long_rows, thinking, self.template)

    def pinned_recipe(self) -> Recipe:
        """The recipe with a hub model's revision resolved to its commit, as the run keeps it."""
        if self.model.kind != "hub":
            return self.recipe
        pinned = self.recipe.model.model_copy(update={"revision": self.model.digest.rsplit("@", 1)[1]})
        return self.recipe.model_copy(update={"model": pinned})

    def _once(self, key: Hashable, make: Callable[[], T]) -> T:
        if key not in self._memo:
            self._memo[key] = make()
        return cast("T", self._memo[key])
