"""SQuAD's scores, which lm-eval's xquad imports from a module that transformers no longer has.

Exact match and token F1 of SQuAD's official evaluation (Rajpurkar et al. 2016, arXiv 1606.05250, evaluate-v2.0.py).
"""

from __future__ import annotations

import re
import string
import sys
import types
from collections import Counter
from importlib.util import find_spec

METRICS = "transformers.data.metrics"


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and English articles, one space between words."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def compute_exact(gold: str, answer: str) -> int:
    """1 where the normalised texts are equal, else 0."""
    return int(normalize_answer(gold) == normalize_answer(answer))


def compute_f1(gold: str, answer: str) -> float:
    """The harmonic mean of precision and recall over the normalised texts' words."""
    wanted, given = normalize_answer(gold).split(), normalize_answer(answer).split()
    if not wanted or not given:
        return float(wanted == given)
    same = sum((Counter(wanted) & Counter(given)).values())
    return 2 * same / (len(wanted) + len(given)) if same else 0.0


def stand_in() -> None:
    """Register this module where lm-eval 0.4.13 imports the scores from, unless transformers has them."""
    if METRICS in sys.modules or find_spec(METRICS) is not None:
        return
    package, module = types.ModuleType(METRICS), types.ModuleType(f"{METRICS}.squad_metrics")
    for function in (normalize_answer, compute_exact, compute_f1):
        setattr(module, function.__name__, function)
    vars(package)["squad_metrics"] = module
    sys.modules |= {METRICS: package, module.__name__: module}
