"""A report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from qcft.report.document import Block, Document, Figure, Fold, Listing, Prose, Sample, Table, with_code


def to_markdown(document: Document) -> str:
    """The report as one Markdown file; plots are links to their files in `plots/`."""
    parts = [f"# {line(document.title)}", f"**{line(document.question)}**\n{sentence(document.answer)}"]
    for section in document.sections:
        parts.append(f"## {line(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table of rows with the title of each cell."""
    return _table(rows[0], [row.values() for row in rows])


def _table(titles: Collection[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(map(_cell, titles)) + " |", "|" + "---|" * len(titles)]
    return "\n".join(lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in rows])


def _block(block: Block) -> str:
    match block:
        case Table():
            parts = (f"**{line(block.caption)}**", _table(block.head, block.rows), sentence(block.note))
            return "\n\n".join(filter(None, parts))
        case Figure():
            return f"![{line(block.alt)}](plots/{block.name}.svg)\n\n{line(block.caption)}"
        case Sample():
            answers = (f"- {line(a.stage)}: {line(a.text)}{'' if a.finished else ' ...'}" for a in block.answers)
            return "\n".join((f"**{line(block.prompt)}**\n", *answers))
        case Fold():
            return "\n\n".join((f"### {line(block.title)}", *map(_block, block.samples)))
        case Listing():
            return f"{line(block.caption)}:\n\n{fenced(block.text, block.language)}"
        case Prose():
            return "\n".join(f"- {sentence(text)}" for text in block.sentences)


def line(text: str) -> str:
    """Text (it may be a model's) as one line of Markdown that cannot break the page."""
    return _escaped(" ".join(text.split()))


def sentence(text: str) -> str:
    """A sentence of qcft's as one line, whose commands, between backquotes, are code spans."""
    parts = with_code(" ".join(text.split()))
    return "".join(code(part) if is_code else _escaped(part) for part, is_code in parts)


def code(text: str) -> str:
    """Text as a code span."""
    marks = "`" * (_longest_marks(text) + 1)
    space = " " if "`" in text else ""
    return f"{marks}{space}{' '.join(text.split())}{space}{marks}"


def fenced(text: str, language: str) -> str:
    """Text that ends with a newline, as a code block."""
    marks = "`" * max(3, _longest_marks(text) + 1)
    return f"{marks}{language}\n{text}{marks}"


def _longest_marks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _cell(text: str) -> str:
    """Text in a table, where brackets alone do not make a link: those of intervals stay readable in the file."""
    return "<br>".join(_escaped(part, "[]" if "](" in part else "") for part in text.split("\n"))


def _escaped(text: str, brackets: str = "[]") -> str:
    """Text, escaped so that it has no links, images, HTML or emphasis."""
    special = "\\`*_<>#|~$" + brackets
    text = "".join("\\" + c if c in special else c for c in text.replace("&", "&amp;"))
    return re.sub(r"(?<=:)(?=//)|(?<=\bwww)(?=\.)", r"\\", text, flags=re.IGNORECASE)  # bare addresses become links
