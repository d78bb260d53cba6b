"""The prompts that stages answer: those that are given, and held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from qcft.data.rows import Message, Row
from qcft.errors import InputError, nearest
from qcft.files import oddity
from qcft.prepare.groups import Group
from qcft.prepare.model import PreparedModel
from qcft.prepare.prepared import Prepared
from qcft.replay.pools import ENGLISH


@dataclass(frozen=True)
class Question:
    """A prompt under a system prompt; of a held-out row also its language, group and reference answer."""

    row: Row
    system: str | None
    lang: str | None = None
    group: str | None = None

    @property
    def text(self) -> str:
        """The user's prompt."""
        return self.row.prompt[-1].content

    @property
    def reference(self) -> str | None:
        """The held-out row's answer."""
        return self.row.reference


def prompt_text(text: str, what: str = "the prompt") -> str:
    """A prompt without white space around it. Raises InputError for one that is empty or not valid text."""
    if not text.strip():
        raise InputError(f"{what} is empty", "write a question")
    if any("\ud800" <= one <= "\udfff" for one in text):
        raise InputError(f"{what} is not valid UTF-8 text", "give it in UTF-8")
    return text.strip()


def given_prompts(texts: Sequence[str], system: str | None) -> list[Question]:
    """Questions of given prompts. Raises InputError for one that is empty or not valid text."""
    found = [prompt_text(text, f"prompt {number} of {len(texts)}") for number, text in enumerate(texts, start=1)]
    return [Question(Row((Message("user", text),), ()), system) for text in found]


def text_lines(path: Path, what: str, hint: str) -> list[str]:
    """The lines of a UTF-8 file that hold text; `what` names it in errors. Raises InputError."""
    if (odd := oddity(path)) is not None:
        raise InputError(f"{what}: {str(path)!r} is {odd}", hint)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{what}: there is no file {str(path)!r}", hint) from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{what}: {str(path)!r} cannot be read as text: {error}", "give a UTF-8 file") from None
    if "\0" in text:
        raise InputError(f"{what}: {str(path)!r} is binary, not text", "give a UTF-8 file")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise InputError(f"{what}: {str(path)!r} has no line of text", hint)
    return lines


def held_out_questions(prepared: Prepared, langs: Sequence[str], most: int, max_new_tokens: int) -> list[Question]:
    """At most `most` held-out rows of each language (none named: English, then each trained language), those whose
    prompts leave room for an answer. English rows are the first of those that every stage answers when it is measured.
    Raises InputError for a language without held-out rows."""
    groups: dict[str, Group] = {}
    for group in (group for group in prepared.groups if not group.is_text):
        groups.setdefault(group.lang, group)  # the earliest phase's, where several have some
    known = sorted(groups, key=lambda lang: lang != ENGLISH)
    found = []
    for lang in dict.fromkeys(langs or known):
        if lang not in groups:
            hint = f"it has {', '.join(known)}" if known else "give your own prompts: --prompt TEXT"
            if any(group.lang == lang for group in prepared.groups):
                raise InputError(f"the run has no prompts in {lang!r}: its held-out rows are raw text", hint)
            raise InputError(f"the run has no held-out rows in {lang!r}", nearest(lang, known) + hint)
        group = groups[lang]
        rows = {row.prompt_digest: row for row in prepared.held_out(group).rows}
        asked = (Question(row, group.system, lang, group.name) for row in sorted(rows.values(), key=lambda r: r.key))
        found += list(islice((q for q in asked if not isinstance(prompt_ids(q, prepared, max_new_tokens), str)), most))
    return found


def positions_of(prepared: PreparedModel) -> int | None:
    """The tokens that a model has positions for; None where its config does not give it."""
    config: Any = prepared.meta_model.config
    found = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def prompt_ids(question: Question, prepared: PreparedModel, max_new_tokens: int) -> list[int] | str:
    """The prompt's tokens, formatted by the model's chat template; or why it cannot be used: the template refuses
    it, or it leaves no room for the answer."""
    ids = prepared.encoder_for(question.system, None, "drop").prompt(question.row)
    positions = positions_of(prepared)
    if isinstance(ids, str) or positions is None or len(ids) + max_new_tokens <= positions:
        return ids
    return f"it has {len(ids):,} tokens; with its answer of {max_new_tokens:,} it may have {positions:,} in this model"
