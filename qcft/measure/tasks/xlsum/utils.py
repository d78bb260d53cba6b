"""ROUGE-L for XL-Sum (lm-eval finds this file beside the tasks' YAML)."""

from __future__ import annotations

from functools import partial
from typing import Any

from qcft.measure.rouge import rouge_l

LANGUAGES = ("ar", "en", "es", "fr", "id", "ja", "ko", "pt", "ru", "th", "vi")


def process_results(doc: dict[str, Any], results: list[str], lang: str) -> dict[str, float]:
    """The answer's ROUGE-L against the reference summary."""
    return {"rougeL": rouge_l(results[0], doc["summary"], lang)}


globals().update({f"process_results_{lang}": partial(process_results, lang=lang) for lang in LANGUAGES})
