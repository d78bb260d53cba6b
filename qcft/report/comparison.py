"""The answers of several stages to the same prompts, as text and as a page."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TypedDict

from qcft.errors import InputError
from qcft.files import reporting_unwritable, write_text
from qcft.report.document import Document, Sample, Section, StageAnswer, Table
from qcft.report.page import to_page
from qcft.safe import plain

LANGUAGE = "in the row's language, of those identified"
HINT = "name an .html file in a folder that can be written"


class ComparedAnswer(TypedDict):
    """A stage's answer: `lang` by py3langid, None where it is not certain or there are too few letters."""

    text: str
    tokens: int
    finished: bool
    lang: str | None


class ComparedPrompt(TypedDict):
    """A prompt with each stage's answer; for a held-out row its group, language and reference answer, else None."""

    prompt: str
    held_out: str | None
    lang: str | None
    reference: str | None
    answers: dict[str, ComparedAnswer]


# The answers of a run's stages, and of those of a second run, `with`.
Compared = TypedDict(
    "Compared",
    {
        "run": str,
        "with": str | None,
        "model": str,
        "max_new_tokens": int,
        "stages": list[str],
        "prompts": list[ComparedPrompt],
    },
)


def answer_rows(prompt: ComparedPrompt) -> list[tuple[str, str, str]]:
    """A prompt's answers: the stage, a note on length, end and language, the text; a held-out row's reference last."""
    rows = [(stage, answer_note(answer), answer["text"] or "(no text)") for stage, answer in prompt["answers"].items()]
    return rows if prompt["reference"] is None else [*rows, ("reference", "from the data", prompt["reference"])]


def answer_note(answer: ComparedAnswer) -> str:
    """`23 tokens, es`; `64 tokens, cut off, language unclear`."""
    words = [f"{answer['tokens']} token{'s' * (answer['tokens'] != 1)}"]
    words += [] if answer["finished"] else ["cut off"]
    return ", ".join([*words, *([answer["lang"] or "language unclear"] if answer["text"] else [])])


def summary_rows(found: Compared) -> list[dict[str, str]]:
    """A row for each stage: the mean length of its answers, how many ended, how many are in their row's language."""
    rows = []
    for stage in found["stages"]:
        answers = [(prompt["lang"], prompt["answers"][stage]) for prompt in found["prompts"]]
        row = {
            "stage": stage,
            "mean tokens": f"{fmean(answer['tokens'] for _, answer in answers):.0f}",
            "ended by themselves": f"{sum(answer['finished'] for _, answer in answers)} of {len(answers)}",
        }
        right = [answer["lang"] == lang.split("-")[0] for lang, answer in answers if lang and answer["lang"]]
        if any(lang for lang, _ in answers):
            row[LANGUAGE] = f"{sum(right)} of {len(right)}" if right else "-"
        rows.append(row)
    return rows


def about(found: Compared) -> str:
    """How the answers were generated, and what their notes mean."""
    return (
        f"Greedy answers of at most {found['max_new_tokens']} tokens; cut off: not finished within these. "
        "Languages by py3langid; unclear: not certain, or fewer than 20 letters."
    )


def check_page(to: Path) -> None:
    """Check that a page can be written, by creating a file in its folder. Raises InputError."""
    if to.suffix.lower() not in {".html", ".htm"} or to.is_dir():
        raise InputError(f"--to {str(to)!r} is not an .html file", HINT)
    with reporting_unwritable(to, "the page", HINT):
        trial = to.with_name(f".{to.name}.trial")
        trial.touch()
        trial.unlink()


def write_comparison(to: Path, found: Compared) -> None:
    """Write the answers as one self-contained HTML page. Raises InputError."""
    with reporting_unwritable(to, "the page", HINT):
        write_text(to, plain(to_page(_document(found))))


def samples_of(found: Compared) -> tuple[Sample, ...]:
    """The prompts with their answers, for a page."""
    return tuple(
        Sample(
            prompt["prompt"],
            prompt["lang"] or "",
            tuple(
                StageAnswer(
                    f"{title}: {more}", text, title not in prompt["answers"] or prompt["answers"][title]["finished"]
                )
                for title, more, text in answer_rows(prompt)
            ),
        )
        for prompt in found["prompts"]
    )


def _document(found: Compared) -> Document:
    names = [found["run"], *([found["with"]] if found["with"] else [])]
    count = len(found["prompts"])
    table = Table.of("comparison", "The answers of each stage", summary_rows(found), (), about(found))
    question = f"What do {', '.join(found['stages'])} of {found['model']} answer to the same {count} prompts?"
    sections = (Section("answers", "Answers", samples_of(found)), Section("figures", "In numbers", (table,)))
    return Document(" and ".join(names), question, "", sections)
