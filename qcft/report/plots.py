"""The style of plots: readable in black and white, for colour-blind readers, on white paper and on a dark page.

Each series has its own colour, marker, line style and hatch, so that no information depends on colour alone. The
colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), without those that are too pale for white paper.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from qcft.report.document import Figure
from qcft.safe import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from matplotlib.text import Text

INK, FAINT, PAPER = "#1b1b1e", "#8a8a90", "#fefefe"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a8528c", "#b07c00", "#4a4a52")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 3)))
HATCHES = ("", "///", "..", "xx", "\\\\\\", "++", "o", "--")  # a dot needs as many bytes of SVG as fifty lines
LEGEND_ROW, NAME_ROW = 0.21, 0.15  # inches
WIDTH = 4.8  # inches: as wide as a phone, so that text stays readable there
WIDE = 9.6  # inches: as wide as the page on a desktop, with text of the same size
PNG_DPI = 400
LONGEST = 40  # characters of a line in a legend
NAMES = 0.35  # of the width: names beside the y-axis that need more are wrapped
UNIT = "NLL, nats per answer token"
BETTER, LOWER = "better \u2192", "\u2190 better"  # at the end of an axis' title: along the axis, a y-axis' upwards

# The page replaces these colours by its own, for dark or light mode.
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
    "svg.fonttype": "none",  # text stays text: small files, readable by screen readers
    "text.color": INK,
    "text.parse_math": False,  # names may contain a dollar sign
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}


class Look(NamedTuple):
    """The look of a series."""

    colour: str
    marker: str
    line: Any
    hatch: str


def look(i: int) -> Look:
    """The look of series `i`. Colour and line style are unique among any 36 in a row, colour and marker (or hatch)
    among any 24."""
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
    """A plot that `body` draws on its axes, or on several `panels` that share the x-axis; `height` in inches, without
    the legend.

    It is drawn twice, for a phone (also the files) and for a wide page. Equal drawings give equal bytes.
    """
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in the PNG; the SVG uses the reader's fonts
        warnings.filterwarnings("ignore", "constrained_layout not applied")  # a label longer than the plot is wide
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE | {"svg.hashsalt": name})
        canvas = new_canvas(body, WIDTH, height, panels)
        svg, png = _svg(canvas), io.BytesIO()
        canvas.savefig(png, format="png", dpi=PNG_DPI, metadata={"Software": None})
        return Figure(name, caption, alt, svg, png.getvalue(), _svg(new_canvas(body, WIDE, height, panels)))


def new_canvas(body: Callable[[Any], None], width: float, height: float, panels: int) -> Canvas:
    """A drawing of this size in inches, laid out, whose axes `body` fills; labels that are too long are wrapped."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as NewCanvas

    canvas = NewCanvas(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(canvas)  # measures text; without it each measurement would make another renderer
    body(canvas.subplots(panels, sharex=True))
    layout: Any = canvas.get_layout_engine()
    layout.execute(canvas)
    for wrap in (_wrap_names, _wrap_across, _wrap_up):  # in this order, as each changes the size of the axes
        wrapped = [wrap(axes) for axes in canvas.axes]
        if any(wrapped):
            layout.execute(canvas)
    canvas.set_layout_engine(None)  # otherwise each file would be laid out again
    return canvas


def _svg(canvas: Canvas) -> str:
    svg = io.BytesIO()
    unsigned = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # no dates, no versions
    canvas.savefig(svg, format="svg", metadata=unsigned)
    return plain(svg.getvalue().decode())


def _wrap_names(axes: Axes) -> bool:
    """Wrap names beside the y-axis that need too much of the width; the figure grows by the added lines. Whether any
    was wrapped."""
    figure: Any = axes.figure
    names, room = axes.get_yticklabels(), NAMES * figure.bbox.width
    wrapped = [_wrapped(one.get_text(), one.get_window_extent().width, room) for one in names]
    if wrapped == [one.get_text() for one in names]:
        return False
    axes.set_yticks(axes.get_yticks(), wrapped, fontsize=9)
    most = max(name.count("\n") for name in wrapped)
    figure.set_figheight(figure.get_figheight() + NAME_ROW * most * len(wrapped))
    return True


def _wrap_across(axes: Axes) -> bool:
    """Wrap the x-axis' title where it is longer than the axis; whether it was."""
    title = axes.xaxis.label
    return _wrap_title(title, title.get_window_extent().width, 0.9 * axes.bbox.width)


def _wrap_up(axes: Axes) -> bool:
    """Wrap the y-axis' title where it is longer than the axis; whether it was."""
    title = axes.yaxis.label
    return _wrap_title(title, title.get_window_extent().height, axes.bbox.height)


def _wrap_title(title: Text, size: float, room: float) -> bool:
    before = title.get_text()
    title.set_text(_wrapped(before, size, room))
    return bool(title.get_text() != before)


def _wrapped(text: str, size: float, room: float) -> str:
    """A text of this size, wrapped to lines that fit the room."""
    if size <= room:
        return text
    lines = text.split("\n")
    width = max(1, int(max(map(len, lines)) * room / size))
    return "\n".join(part for line in lines for part in textwrap.wrap(line, width))


def inline_svg(figure: Figure, wide: bool = False) -> str:
    """A plot as a part of an HTML page: ids that are unique there, colours that follow the page."""
    svg = figure.wide if wide else figure.svg
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{figure.name}-{'wide-' * wide}", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[\d.]+pt" height="[\d.]+pt"', r'\1 aria-hidden="true"', svg)
    return re.sub("|".join(ON_PAGE), lambda colour: ON_PAGE[colour[0]], svg)


def label(axes: Axes, across: str, up: str) -> None:
    """Set the axes' titles, and add the legend."""
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    legend_below(axes)


def legend_below(axes: Axes, columns: int = 2) -> None:
    """Add a legend outside the axes: below, in a figure that grows by it; beside them in a wide figure."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:  # matplotlib skips labels that begin with an underscore
        return
    figure: Any = axes.figure
    labels = [textwrap.fill(label, LONGEST) for label in labels]
    if figure.get_figwidth() > WIDTH:
        figure.set_figheight(max(figure.get_figheight(), LEGEND_ROW * (len(labels) + 2)))
        figure.legend(handles, labels, loc="outside right upper")
        return
    columns = 1 if max(map(len, labels)) > LONGEST * 0.6 else min(columns, len(labels))
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower left", ncols=columns)


def label_layers(axes: Axes, title: str = "decoder layer") -> None:
    """Set the title of an x-axis of decoder layers, and its ticks to whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def better_up_and_right(axes: Axes) -> None:
    """Set the axes of EA against MA: inverted, as a lower NLL is better."""
    axes.margins(0.12)
    axes.set_xlabel(f"MA: other languages ({UNIT}), {BETTER}")
    axes.set_ylabel(f"EA: English\nNLL, {BETTER}")
    axes.invert_xaxis()
    axes.invert_yaxis()
