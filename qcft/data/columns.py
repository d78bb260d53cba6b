"""Finds the columns of a record: by the recipe's `columns`, by the known formats, by other common names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qcft.data.formats import COLUMNS, FORMATS, PROMPT_COLUMNS, DataRecord, column_names, detect_format
from qcft.errors import InputError, nearest
from qcft.recipe import Source

# Other names for `instruction` and `output`; the first pair that a record has is used.
QUESTIONS = ("instruction", "question", "prompt", "query")
ANSWERS = ("output", "response", "answer", "completion", "target")
PAIRS = [
    *((q, a) for q in QUESTIONS for a in ANSWERS), ("text", "target"), ("input", "output"), ("source", "target"),
    ("question", "answers"),  # SQuAD and sets in its form: a passage in `context`, and answers that are accepted
]  # fmt: skip
OTHER_NAMES = {"conversations": "conversation", "system": "system_prompt", "input": "context"}


@dataclass(frozen=True)
class _Shape:
    """How records with the same columns are read: `names` maps the format's column names to the record's."""

    format: str
    names: dict[str, str]


class Columns:
    """Renames the columns of one source's records to those that `formats` reads. `unused`: columns that nothing reads.

    `answers`: records must have answers; `aliases`: other names of columns are accepted.
    """

    def __init__(self, source: Source, what: str = "data", answers: bool = True, aliases: bool = True) -> None:
        self.source = source
        self.what = what
        self.answers = answers
        self.aliases = aliases
        self.format: str | None = None if source.format == "auto" else source.format
        self._first: _Shape | None = None
        self.unused: dict[str, None] = {}
        self._shapes: dict[tuple[Any, ...], _Shape | None] = {}

    def read(self, record: dict[str, Any]) -> tuple[str, DataRecord] | None:
        """A record's format, and the record with the format's column names; None for an unknown format.

        After the first record of a known format, records of an unknown format are read in that format. Raises
        InputError if the first record lacks a column that the recipe names.
        """
        key = tuple(name for name, value in record.items() if value is not None)
        if key not in self._shapes:
            self._shapes[key] = self._shape(record, key)
        shape = self._shapes[key]
        if shape is None:
            return None
        self._first = self._first or shape
        self.format = self._first.format
        if (shape.format == "text") != (self.format == "text"):
            other = self.format if shape.format == "text" else shape.format
            raise mixes_text(self.source, self.what, f"rows of raw text and of {other}", other)
        if not shape.names:
            return shape.format, record
        others = {name: value for name, value in record.items() if name not in shape.names.values()}
        return shape.format, others | {name: record[column] for name, column in shape.names.items()}

    def unknown(self, record: dict[str, Any], number: int) -> InputError:
        """The error for a record of an unknown format; `number` counts the source's records from 1."""
        known = COLUMNS if self.answers else PROMPT_COLUMNS
        where = f"row {number} of {self.source.path!r}"
        return InputError(
            f"{self.what}: {where} has the columns {column_names(record)}: no known format",
            "name the columns with --columns instruction=COLUMN,output=COLUMN (in a recipe, columns: {instruction: "
            "COLUMN, output: COLUMN}); known formats: "
            + "; ".join(f"{name} ({columns})" for name, columns in known.items())
            + "; question and answer",
        )

    def _shape(self, record: dict[str, Any], filled: tuple[Any, ...]) -> _Shape | None:
        given = self._given(record)
        others = [name for name in record if name not in given.values()]
        there = {str(name).strip().lower(): name for name in others} | {name: name for name in others} | given
        if self.aliases and "conversations" not in there and "conversation" in there:
            there["conversations"] = there["conversation"]
        found = self._format({name: record[column] for name, column in there.items() if column in filled})
        found = found or self._format({name: record[column] for name, column in there.items()})
        if found is None and self._first is not None:
            names = {name: column for name, column in self._first.names.items() if column in record}
            return _Shape(self._first.format, names)
        if found is None:
            return None
        format, stands_for = found
        names = {name: there[other] for name, other in stands_for.items()}
        for name in (*FORMATS[format].needs, *FORMATS[format].may_have, "id"):
            other = OTHER_NAMES.get(name, name) if self.aliases and name not in there else name
            if name not in names and other in there and there[other] not in names.values():
                names[name] = there[other]
        names |= {f"{name}_en": f"{column}_en" for name, column in names.items() if f"{column}_en" in record}
        self.unused |= dict.fromkeys(str(column) for column in filled if column not in names.values())
        return _Shape(format, {name: column for name, column in names.items() if name != column})

    def _given(self, record: dict[str, Any]) -> dict[str, str]:
        """The names from the recipe. Raises InputError for a column that the first record lacks."""
        given = self.source.columns
        missing = [column for column in given.values() if column not in record]
        if missing and not self._shapes:
            raise InputError(
                f"{self.what}: {self.source.path!r} has no column {missing[0]!r}",
                nearest(missing[0], [str(name) for name in record]) + f"it has {column_names(record)}",
            )
        return {name: column for name, column in given.items() if column in record}

    def _format(self, record: DataRecord) -> tuple[str, dict[str, str]] | None:
        """The format of a record, and the columns that hold its question and answer."""
        if self.source.format != "auto":
            return self.source.format, {}
        known = detect_format({*record}) or detect_format({*record}, self.answers)
        if known is not None or not self.aliases:
            return (known, {}) if known else None
        for question, answer in PAIRS:
            if all(_may_be_text(record.get(name)) for name in (question, answer)):
                if question == "prompt":
                    return "prompt-completion", {"prompt": question, "completion": answer}
                return "alpaca", {"instruction": question, "output": answer}
        question = "" if self.answers else next((q for q in QUESTIONS if isinstance(record.get(q), str)), "")
        return ("alpaca", {"instruction": question}) if question else None


def _may_be_text(value: Any) -> bool:
    """Whether a cell is text, its parts, or the accepted answers of a question."""
    return isinstance(value, (str, bytes, list)) or (isinstance(value, dict) and "text" in value)


def mixes_text(source: Source, what: str, both: str, other: str = "messages") -> InputError:
    """The error for a source that holds `both` raw text and instructions, of the format `other`."""
    return InputError(
        f"{what}: {source.path!r} holds {both}: it is not clear which to train on",
        f"set format: text or format: {other} to read one of them, or give each its own source",
    )
