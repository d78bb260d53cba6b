"""How plots look: readable in black and white, to colour-blind readers, on white paper and on a dark page.

A series has a colour, a marker, a line style and a hatch of its own, so that no colour carries meaning alone. The
colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), less those too pale for white paper.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from qcft.report.document import Figure
from qcft.safe import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, PAPER = "#1b1b1e", "#8a8a90", "#fefefe"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a8528c", "#b07c00", "#4a4a52")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 3)))
HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oooo", "----")
LEGEND_ROW = 0.21  # inches
WIDTH = 4.8  # inches: as wide as a phone, so that text stays readable there
PNG_DPI = 200
UNIT = "NLL, nats per answer token"

# The page gives these colours its own, by the reader's choice of dark or light.
ON_PAGE = {INK: "var(--ink)", FAINT: "var(--faint)", PAPER: "var(--paper)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(COLOURS)
}

STYLE: dict[Any, Any] = {
    "axes.edgecolor": FAINT,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": PAPER,
    "font.size": 11,
    "grid.alpha": 0.3,
    "grid.color": FAINT,
    "hatch.linewidth": 0.8,
    "legend.edgecolor": FAINT,
    "legend.facecolor": PAPER,
    "legend.fontsize": 10,
    "legend.frameon": False,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",  # letters stay letters: small files, read aloud by screen readers
    "text.color": INK,
    "text.parse_math": False,  # names may hold a dollar sign
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}


class Look(NamedTuple):
    """What a series is known by."""

    colour: str
    marker: str
    line: Any
    hatch: str


def look(i: int) -> Look:
    """The looks of the series `i`; colour and line differ of any 36 in a row, colour and marker or hatch of any 24."""
    turn = i // len(COLOURS)
    return Look(
        COLOURS[i % len(COLOURS)],
        MARKERS[i % len(MARKERS)],
        LINES[(i + turn) % len(LINES)],
        HATCHES[i % len(HATCHES)],
    )


def draw(
    name: str, caption: str, alt: str, body: Callable[[Any], None], height: float = 2.8, panels: int = 1
) -> Figure:
    """A plot that `body` draws on the axes it is given, or on several that share what is across; `height` in inches, a
    legend apart.

    Equal drawings give equal bytes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in the PNG; the SVG's reader has other fonts
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # a label longer than the plot is wide
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE | {"svg.hashsalt": name})
        canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
        body(canvas.subplots(panels, sharex=True))
        svg, png = io.BytesIO(), io.BytesIO()
        unsigned = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # no dates, no versions
        canvas.savefig(svg, format="svg", metadata=unsigned)
        canvas.set_layout_engine("none")  # laid out already
        canvas.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return Figure(name, caption, alt, plain(svg.getvalue().decode()), png.getvalue())


def inline_svg(figure: Figure) -> str:
    """A plot as a part of an HTML page: ids that are unique there, colours that follow the page."""
    svg = figure.svg[figure.svg.index("<svg") :]
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{figure.name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[\d.]+pt" height="[\d.]+pt"', r'\1 aria-hidden="true"', svg)
    return re.sub("|".join(ON_PAGE), lambda colour: ON_PAGE[colour[0]], svg)


def label(axes: Axes, across: str, up: str) -> None:
    """What the axes show, and the legend."""
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    legend_below(axes)


def legend_below(axes: Axes, columns: int = 2) -> None:
    """A legend under the axes, where it hides nothing and takes nothing from them: the figure grows by it."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:  # matplotlib leaves out what begins with an underscore
        return
    figure: Any = axes.figure
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower left", ncols=min(columns, len(labels)))


def better_up_and_right(axes: Axes) -> None:
    """EA against MA: both rise as NLL falls."""
    axes.margins(0.12)
    axes.set_xlabel(f"MA: other languages ({UNIT})")
    axes.set_ylabel("EA: English (NLL)")
    axes.invert_xaxis()
    axes.invert_yaxis()
