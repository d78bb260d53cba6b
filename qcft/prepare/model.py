"""A model with its tokenizer and its modules; reads no data, and weights only when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from qcft.data.encode import Encoder
from qcft.data.template import Template, Thinking
from qcft.events import Watch
from qcft.models.inputs import Inputs
from qcft.models.meta import model_without_weights
from qcft.models.sources import ModelSource, described_folder, resolve, weights_folder
from qcft.recipe import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


class PreparedModel:
    """A model that was found. Recipes that are prepared with the same `memo` share what they have in common."""

    def __init__(self, asked: Model, watch: Watch, memo: dict[Any, Any] | None = None) -> None:
        self.asked = asked
        self.key = asked.model_dump_json()
        self.watch = watch
        self.memo: dict[Any, Any] = {} if memo is None else memo
        self.model: ModelSource = self.once(("model", self.key), lambda: resolve(asked))

    @cached_property
    def inputs(self) -> Inputs:
        """The model's files, as they were when their digests were taken."""
        return Inputs([self.model])

    @cached_property
    def folder(self) -> Path:
        """The folder with the model's 16-bit weights; downloaded or converted on first use."""
        return self.once(("folder", self.key), lambda: weights_folder(self.model, self.watch))

    @cached_property
    def described(self) -> Path:
        """A folder with the model's config and tokenizer, perhaps without its weights."""
        found: Path | None = self.memo.get(("folder", self.key))
        return found or described_folder(self.model, self.watch)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, with the recipe's chat template."""
        from qcft.models.load import load_tokenizer

        return self.once(("tokenizer", self.key), lambda: load_tokenizer(self.described, self.asked))

    @cached_property
    def template(self) -> Template:
        """The tokenizer's chat template."""
        read = self.asked.special_tokens_in_text
        return self.once(("template", self.key), lambda: Template(self.tokenizer, read))

    @cached_property
    def meta_model(self) -> PreTrainedModel:
        """The model's modules without their weights."""
        return self.once(("meta model", self.key), lambda: model_without_weights(self.described, self.asked))

    def encoder_for(
        self,
        system: str | None,
        max_length: int | None,
        long_rows: str,
        thinking: Thinking = "auto",
        min_tokens: int = 2,
        measuring: bool = False,
    ) -> Encoder:
        """An encoder from rows to tokens with the model's chat template."""
        return Encoder(self.tokenizer, system, max_length, long_rows, thinking, self.template, min_tokens, measuring)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value under `key`, made once for all recipes that share it."""
        if key not in self.memo:
            self.memo[key] = make()
        return cast("T", self.memo[key])
