"""In which language a model answers, how long its answers are, and whether they are finished."""

from __future__ import annotations

from collections.abc import Sequence

from qcft.data.filters import identified, known_languages
from qcft.data.rows import Row
from qcft.models.generate import Answer
from qcft.store.metrics import AnsweredIn, JudgedAnswer


def judge_answer(row: Row, answer: Answer, lang: str) -> JudgedAnswer:
    """An answer to a row's prompt in a language: `right` is whether it is in that language, None where the answer is
    too short to identify its language, or the identifier does not know the prompt's."""
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
    """The share of answers in the prompt's language among those whose language is identified (None where there are
    none), the mean length in tokens, and the share that is not finished."""
    known = [answer["right"] for answer in answers if answer["right"] is not None]
    return {
        "rows": len(answers),
        "told": len(known),
        "right": sum(known) / len(known) if known else None,
        "mean_tokens": sum(answer["tokens"] for answer in answers) / len(answers),
        "unfinished": sum(not answer["finished"] for answer in answers) / len(answers),
    }
