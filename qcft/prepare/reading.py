"""Reads a recipe's sources, each once, and guesses the language of those that name none."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from qcft.data.language import guess_language
from qcft.data.load import LoadedSource, load_source, read_pool
from qcft.data.rows import Row
from qcft.events import Watch
from qcft.recipe import Recipe, Source


class SourceReader:
    """Reads the sources of one recipe; `once` caches results under a key."""

    def __init__(self, recipe: Recipe, watch: Watch, once: Callable[[Hashable, Callable[[], Any]], Any]) -> None:
        self.recipe = recipe
        self.watch = watch
        self.once = once

    def load(self, source: Source, phase: str) -> LoadedSource:
        """A source's rows; if it names no language, with the guessed one, unless it is of a first phase (not one named
        phase2: there the model itself is phase 1)."""
        held_out = self.recipe.heldout
        loaded: LoadedSource = self.once(
            ("source", source.model_dump_json(), held_out.share, held_out.rows),
            lambda: load_source(source, held_out, self.watch),
        )
        first = self.recipe.phases[0].name
        if source.lang is not None or (phase == first and phase != "phase2"):
            return loaded
        return replace(loaded, source=self._guessed(source, loaded.rows))

    def _guessed(self, source: Source, rows: tuple[Row, ...]) -> Source:
        """The source with the language of its rows; the guess is reported to the watch."""
        guess = self.once(("language", source.model_dump_json()), lambda: self._guess(source, rows))
        return source.model_copy(update={"lang": guess})

    def _guess(self, source: Source, rows: tuple[Row, ...]) -> str | None:
        found = guess_language(rows)
        what = f"taken as {found.lang}" if found.lang else "its language is not clear, so tables show it as ?"
        self.watch.note(
            f"data: {source.path} has no lang: {what} ({found.share:.0%} of {found.rows} rows that are long enough); "
            f"set it with lang: {found.lang or 'es'}, or --data {found.lang or 'es'}=PATH",
            "warning",
        )
        return found.lang

    def test(self, source: Source) -> LoadedSource:
        """All rows of one of your own test sets; with the guessed language if it names none."""
        found: LoadedSource = self.once(
            ("test", source.model_dump_json()), lambda: read_pool(source, True, self.watch, "heldout.data")
        )
        if source.lang is not None:
            return found
        return replace(found, source=self._guessed(source, found.rows))


def with_languages(recipe: Recipe, sources: Mapping[str, Sequence[LoadedSource]]) -> Recipe:
    """The recipe with the languages that were guessed, so that reports and later commands know them."""
    phases = []
    for phase in recipe.phases:
        found = [loaded.source for loaded in sources[phase.name]]
        phases.append(phase if found == phase.sources() else phase.model_copy(update={"data": found}))
    return recipe.model_copy(update={"phases": phases})
