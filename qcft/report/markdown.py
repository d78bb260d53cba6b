"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from qcft.report.document import Block, Document, Figure, Listing, Prose, Sample, Table


def to_markdown(document: Document) -> str:
    """The report as one Markdown file; plots are links to their files in `plots/`."""
    parts = [f"# {document.title}", f"**{_line(document.question)}**\n{_line(document.answer)}"]
    for section in document.sections:
        parts.append(f"## {section.title}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def markdown_table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    titles = list(titles)
    lines = ["| " + " | ".join(map(_cell, titles)) + " |", "|" + "---|" * len(titles)]
    return "\n".join(lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in rows])


def _block(block: Block) -> str:
    match block:
        case Table():
            table = markdown_table(block.head, block.rows)
            return "\n\n".join(filter(None, (f"**{block.caption}**", table, _line(block.note))))
        case Figure():
            return f"![{_line(block.alt)}](plots/{block.name}.svg)\n\n{_line(block.caption)}"
        case Sample():
            answers = (f"- {a.stage}: {_line(a.text)}{'' if a.finished else ' ...'}" for a in block.answers)
            return "\n".join((f"**{_line(block.prompt)}**\n", *answers))
        case Listing():
            return f"{block.caption}:\n\n```{block.language}\n{block.text}```"
        case Prose():
            return "\n".join(f"- {_line(sentence)}" for sentence in block.sentences)


def _cell(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", "<br>")


def _line(text: str) -> str:
    """Text, a model's perhaps, as one line of Markdown that can't break the page."""
    flat = " ".join(text.split())
    return "".join("\\" + c if c in "\\`*_[]<>#|" else c for c in flat)
