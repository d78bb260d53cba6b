"""The `replay` section: how much, of which kinds, how it is generated and which answers are dropped."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from qcft.recipe.parts import Count, Number, Part, Sources, named


class Filters(Part):
    """Which generated answers are dropped from replay, besides empty ones.

    `unfinished`: answers that did not end within `max_new_tokens`; if false they are kept, truncated there, without
    loss on an end of turn. They are the longer answers: without them replay teaches shorter answers. `duplicates`: an
    answer of ten words or more that was given before. `loops`: answers in which more than this share of five-word
    sequences are repeats (null: no limit). `language`: answers that are clearly in another language (null: any).
    `refusals`: answers that begin by declining, in English.
    """

    unfinished: bool = False
    duplicates: bool = True
    loops: Annotated[Number, Field(gt=0, le=1)] | None = 0.3
    language: str | None = "en"
    refusals: bool = False


class ReplayKind(Part):
    """Where replay rows come from.

    generative: the model the phase starts from answers English prompts: those of `data`, else the English
    versions of the phase's own prompts, else those of the first phase, else the ones that ship with qcft.
    english: real English rows, those of `data` or of the first phase that are parallel to the phase's rows by id,
    or the phase's `*_en` columns; with `parallel: false` all rows of `data`. phase1: rows of the first phase.
    file: the rows of `path`, such as an edited replay.jsonl. `phase` names another earlier phase, for generative (its
    prompts, in its language) and phase1 (its rows).
    """

    kind: Literal["generative", "english", "phase1", "file"] = "generative"
    data: Sources = []
    path: str | None = None
    phase: str | None = None
    parallel: bool = True

    @model_validator(mode="after")
    def _where_from(self) -> Self:
        if (self.kind == "file") != (self.path is not None):
            what = "needs path: FILE" if self.kind == "file" else "takes no path"
            raise ValueError(f"replay of kind {self.kind} {what} | kind: file, path: replay.jsonl belong together")
        if self.data and self.kind in {"phase1", "file"}:
            raise ValueError(f"replay of kind {self.kind} takes no data | omit data, or use kind: english")
        if self.phase is not None and (self.kind in {"english", "file"} or self.data):
            raise ValueError("phase is for replay of kind phase1 or generative, without data | omit one of them")
        if not self.parallel and not (self.kind == "english" and self.data):
            raise ValueError("parallel: false is for kind: english with data | omit parallel")
        return self


class ReplayPart(ReplayKind):
    """One kind of several; `weight` is its share of the replay rows, relative to the others."""

    weight: Annotated[Number, Field(gt=0)] = 1.0


def ratio_alone(value: Any) -> Any:
    """Turns a bare number given for `replay` into its ratio."""
    return {"ratio": value} if isinstance(value, (int, float)) else value


class Replay(ReplayKind):
    """Rows that keep English alive: `ratio` is their share of the final mix, by rows or by answer tokens.

    `kind`, `data`, `path`, `phase` and `parallel` set one kind of rows; `mix` sets several, with weights. When there
    are too few rows, `on_shortfall` raises an error, repeats rows, or shrinks the share. `stratify` draws rows so that
    any part of them has the same lengths, or languages, as the whole. `loss` of a replay row: the cross-entropy of its
    answer, or `distil`, the divergence from the model that the phase starts from on each of its answer tokens.
    """

    ratio: Annotated[Number, Field(ge=0, le=0.9)]
    unit: Literal["rows", "tokens"] = "rows"
    mix: list[Annotated[ReplayPart, BeforeValidator(named("kind"))]] = []
    on_shortfall: Literal["error", "repeat", "shrink"] = "error"
    stratify: Literal["length", "language"] | None = None
    loss: Literal["answer", "distil"] = "answer"
    max_new_tokens: Annotated[Count, Field(ge=1)] = 256
    temperature: Annotated[Number, Field(ge=0)] = 0.7
    top_p: Annotated[Number, Field(gt=0, le=1)] = 0.9
    chunk: Annotated[Count, Field(ge=1)] = 64
    batch: Annotated[Count, Field(ge=1)] | Literal["auto"] = "auto"
    filters: Filters = Filters()

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        if self.mix and ReplayKind(**{key: getattr(self, key) for key in ReplayKind.model_fields}) != ReplayKind():
            raise ValueError("both mix and one kind of replay | put kind, data and path into the entries of mix")
        if self.loss == "distil" and self.ratio == 0:
            raise ValueError("loss: distil with ratio 0 has no rows to distil on | give a ratio, or omit loss")
        return self

    def parts(self) -> list[ReplayPart]:
        """The kinds of rows that are mixed."""
        single = ReplayPart(**{key: getattr(self, key) for key in ReplayKind.model_fields})
        return list(self.mix) or [single]
