"""A report as one HTML page that needs nothing beside it: no script, no network, every text escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qcft.report.document import Document
from qcft.report.plots import inline_svg

HERE = Path(__file__).parent


def to_page(document: Document) -> str:
    """The report as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    # Of all that goes into the page only qcft's own drawings and styles are taken as they are; matplotlib escapes
    # the texts in its drawings.
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["a"] = _is_a
    environment.globals |= {
        "style": Markup((HERE / "page.css").read_text(encoding="utf-8")),  # noqa: S704
        "inline": lambda figure: Markup(inline_svg(figure)),  # noqa: S704
    }
    return environment.get_template("page.html").render(document=document)


def _is_a(block: Any, kind: str) -> bool:
    return type(block).__name__ == kind
