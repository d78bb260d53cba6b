"""Building blocks of the schema: parts that refuse unknown keys, numbers, data sources."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")  # of a run, a phase, an arm: safe in a path


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false | give a number")
    return value


Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]  # a name to look something up: an empty one would mean the current folder
Count = Annotated[int, BeforeValidator(_no_bool)]
Seed = Annotated[Count, Field(ge=0, lt=2**32)]  # the range that NumPy's generator accepts


class Part(BaseModel):
    """A frozen part of the recipe that refuses unknown keys."""

    # Defaults are validated like given values, so that a recipe read back has exactly the same ids.
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


def instead(of: str) -> str:
    """The hint for a field that qcft sets itself: the recipe key to use, or why to omit it."""
    return of if of.startswith("omit it") else f"use {of}"


def named(key: str) -> Callable[[Any], Any]:
    """A validator that reads a bare text as `{key: text}`."""
    return lambda value: {key: value} if isinstance(value, str) else value


def _listed(value: Any) -> Any:
    """Turns a single entry into a list of one."""
    return [value] if isinstance(value, (str, dict)) else value


Column = Literal[
    "id", "instruction", "input", "output", "system", "history", "messages", "conversations", "prompt", "completion",
    "text",
]  # fmt: skip


class Source(Part):
    """One data set: a file, a folder, a hub id, or `qcft:NAME` for data that ships with qcft.

    `{lang}` in `path`, with a list as `lang`, stands for one source per language. `take` is the number
    of rows to train on; held-out rows are read in addition. `columns` gives the data's own name of each column.
    `sample_by`: which part of a .txt file is one document of raw text: the whole file (the default), each paragraph
    (separated by blank lines), or each line. A hub data set of .txt files is read by lines, unless this is set.
    """

    path: Name
    lang: str | list[str] | None = None
    take: Annotated[Count, Field(ge=1)] | None = None
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt-completion", "text"] = "auto"
    sample_by: Literal["document", "paragraph", "line"] | None = None
    columns: dict[Column, Name] = {}
    revision: str | None = None
    subset: str | None = None
    split: str = "train"

    @model_validator(mode="after")
    def _languages(self) -> Self:
        if isinstance(self.lang, list):
            if not self.lang:
                raise ValueError("lang: the list of languages is empty | name a language, such as es")
            if len(self.lang) > 1 and "{lang}" not in self.path:
                raise ValueError(
                    "lang: several languages, but no {lang} in path | write {lang} in path, or give one source for each"
                )
        elif "{lang}" in self.path and self.lang is None:
            raise ValueError("path: {lang} stands for a language, but lang is not given | add lang: [es, pt]")
        return self

    def expanded(self) -> list[Source]:
        """One source per language, with `{lang}` filled in."""
        langs = self.lang if isinstance(self.lang, list) else [self.lang]
        return [
            self.model_copy(update={"lang": lang, "path": self.path.replace("{lang}", lang or "")}) for lang in langs
        ]


Sources = Annotated[list[Annotated[Source, BeforeValidator(named("path"))]], BeforeValidator(_listed)]
