"""A report as one self-contained HTML page: no script, no network, every text is escaped.

Its links to the files of tables and plots work if these are in the same folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcft.report.document import Document, with_code
from qcft.report.plots import inline_svg

HERE = Path(__file__).parent
LONG, LINES = 360, 9  # the most characters and lines of a text that is shown in full
HEAD = 220  # characters of a longer one that are shown at first


def to_page(document: Document, files: bool = False) -> str:
    """The report as HTML. `files`: whether it links to the files of tables and plots that `write_report` writes."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    def with_commands(text: str) -> Markup:
        """A sentence whose commands, between backquotes, are set as code."""
        return Markup().join(
            Markup("<code>{}</code>").format(part) if is_code else escape(part) for part, is_code in with_code(text)
        )

    # Only qcft's own drawings and styles are put into the page without escaping; matplotlib escapes the texts in its
    # drawings.
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["a"] = _is_a
    environment.filters["with_commands"] = with_commands
    environment.globals |= {
        "style": Markup((HERE / "page.css").read_text(encoding="utf-8")),  # noqa: S704
        "inline": lambda figure, wide=False: Markup(inline_svg(figure, wide)),  # noqa: S704
        "shortened": shortened,
    }
    return environment.get_template("page.html").render(document=document, files=files)


def shortened(text: str, tail: int = 0) -> str:
    """The beginning of a long text, and its last `tail` characters, as the question may be at the end of a prompt;
    empty for a text that is shown in full."""
    lines = text.strip().split("\n")
    if len(text) <= LONG and len(lines) <= LINES:
        return ""
    head = "\n".join(lines[: LINES - 2])
    if len(head) > HEAD:
        head = head[:HEAD].rsplit(None, 1)[0]
    end = text.strip()[len(head) :][-tail:] if tail else ""
    return f"{head} … {end}".strip()


def _is_a(block: Any, kind: str) -> bool:
    return type(block).__name__ == kind
