"""Decides which generated answers are kept for replay, and why others are dropped."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from qcft.recipe import Filters

NGRAM = 5  # words of a sequence that should not repeat
REPEATABLE = 10  # words; shorter answers ("Paris") may well answer several prompts
LETTERS = 20  # fewer are too short to identify a language
SURE = 0.5  # with it, 0.3% of 3,000 Alpaca answers of LETTERS or more are identified as not English
REFUSAL = re.compile(
    r"((i'm|i am) (so |very )?sorry|sorry|i apologi[sz]e|unfortunately)\b.{0,40}\b(can't|cannot|unable|not able)\b"
    r"|(i|we)( can't| cannot| won't|( am| are|'m|'re) (unable|not able) to) "
    r"(help|assist|provide|do|fulfil|generate|create|write|answer|comply|complete|give|access|support|discuss)"
    r"|(i'm|i am|as) (just |only )?an? (ai|artificial intelligence|language model)\b"
)


class AnswerFilter:
    """Filters answers in the order they are drawn; remembers them, to find repeated ones."""

    def __init__(self, filters: Filters) -> None:
        self.filters = filters
        self._given: set[str] = set()

    def reason(self, text: str, finished: bool) -> str | None:
        """Why an answer is dropped, or None."""
        if not text.strip():
            return "empty answer"
        if self.filters.unfinished and not finished:
            return "unfinished answer"
        if self.filters.loops is not None and repetition(text) > self.filters.loops:
            return "loop"
        if self.filters.language is not None and speaks_another(text, self.filters.language):
            return "wrong language"
        if self.filters.refusals and REFUSAL.match(" ".join(text.lower().replace("\u2019", "'").split())[:200]):
            return "refusal"
        words = text.split()
        if self.filters.duplicates and len(words) >= REPEATABLE:
            plain = " ".join(words)
            if plain in self._given:
                return "duplicate"
            self._given.add(plain)
        return None


def repetition(text: str) -> float:
    """The share of the text's five-word sequences that are repeats; of five characters if spaces do not separate words.

    After the repetition rules of Rae et al. 2021 (arXiv 2112.11446), whose limit is 0.15 for web pages: answers
    contain more lists and tables.
    """
    units = text.split()
    if len(text) > 12 * len(units):
        units = list("".join(units))
    sequences = [tuple(units[i : i + NGRAM]) for i in range(len(units) - NGRAM + 1)]
    return 1 - len(set(sequences)) / len(sequences) if sequences else 0.0


def speaks_another(text: str, language: str) -> bool:
    """Whether a text is clearly in another language; one that is too short to identify is not."""
    return identified(text) not in {None, language.split("-")[0]}


def identified(text: str) -> str | None:
    """The language of a text, or None if it is too short or not clear."""
    if sum(c.isalpha() for c in text) < LETTERS:
        return None
    found, probability = _identifier().classify(text)
    return str(found) if probability > SURE else None


@cache
def _identifier() -> Any:
    """Loaded once: it takes a second."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def known_languages() -> frozenset[str]:
    """The codes of the languages that can be identified."""
    return frozenset(map(str, _identifier().labels))
