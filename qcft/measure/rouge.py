"""ROUGE-L of texts in any language: words are separated by spaces, in Japanese and Thai by a segmenter."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any


def rouge_l(answer: str, reference: str, lang: str) -> float:
    """ROUGE-L, F-measure (Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries"), from 0 to 1.

    The longest common subsequence is of words, in lower case and without stemming. rouge-score's own tokenizer keeps
    only a-z and 0-9, so it drops the text of most scripts.
    """
    return float(_scorer(lang).score(reference, answer)["rougeL"].fmeasure)


def words(text: str, lang: str) -> list[str]:
    """The words of a text, in lower case, without punctuation; by MeCab in Japanese, by PyThaiNLP in Thai, as in
    XL-Sum's own multilingual ROUGE (Hasan et al. 2021, arXiv 2106.13822)."""
    import regex

    pieces = _segmenter(lang)(text) if lang in {"ja", "th"} else [text]
    # Combining marks belong to words: \w would split a word at them.
    return [word.lower() for piece in pieces for word in regex.findall(r"[\p{L}\p{M}\p{N}]+", piece)]


@cache
def _scorer(lang: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words(lang))


class _Words:
    """A tokenizer for rouge-score."""

    def __init__(self, lang: str) -> None:
        self.lang = lang

    def tokenize(self, text: str) -> list[str]:
        return words(text, self.lang)


@cache
def _segmenter(lang: str) -> Callable[[str], list[str]]:
    if lang == "ja":
        from fugashi import Tagger

        tagger = Tagger("-Owakati")
        return lambda text: [str(word) for word in tagger(text)]
    from pythainlp.tokenize import word_tokenize

    return lambda text: list(word_tokenize(text, engine="newmm", keep_whitespace=False))
