"""In which language a model answers, how long, and whether it comes to an end."""

from __future__ import annotations

from collections.abc import Sequence

from qcft.data.filters import identified, known_languages
from qcft.data.rows import Row
from qcft.models.generate import Answer
from qcft.store.metrics import AnsweredIn, JudgedAnswer


def judge_answer(row: Row, answer: Answer, lang: str) -> JudgedAnswer:
    """An answer to a row's prompt in a language: `right` is whether it is in that language, None where it is too short
    to tell, or the language is none that can be told."""
    found, wanted = identified(answer.text), lang.split("-")[0]
    right = None if found is None or wanted not in known_languages() else found == wanted
    return {
        "prompt": row.prompt[-1].content,
        "text": answer.text,
        "tokens": answer.tokens,
        "finished": answer.finished,
        "found": found,
        "right": right,
        "reference": row.reference,
    }


def summarise_answers(answers: Sequence[JudgedAnswer]) -> AnsweredIn:
    """The share of answers in the prompt's language among those whose language can be told (None where none can),
    the mean length in tokens and the share that did not come to an end."""
    told = [answer["right"] for answer in answers if answer["right"] is not None]
    return {
        "rows": len(answers),
        "told": len(told),
        "right": sum(told) / len(told) if told else None,
        "mean_tokens": sum(answer["tokens"] for answer in answers) / len(answers),
        "unfinished": sum(not answer["finished"] for answer in answers) / len(answers),
    }
