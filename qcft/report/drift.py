"""Drift as a table, in sentences, and as an SVG drawing: layer by layer, the frozen ones marked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from qcft.files import write_text

MOST_ROWS = 12  # of a table; --json and drift.json have every layer
BAR = 10
COLOURS = ("#1f5fa8", "#c0392b", "#2e8b57", "#b8860b", "#7b4fa0", "#444444")
WIDTH, PANEL, MARGIN = 640, 150, 56


def drift_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: MPD and its bar, and for each language mean shift, covariance shift and CKA."""
    layers = found["layers"]
    step = -(-len(layers) // MOST_ROWS)
    shown = [layer for layer in layers if layer["layer"] % step == 0 or layer["layer"] == len(layers) - 1]
    largest = max((layer["mpd"] or 0.0 for layer in layers), default=0.0) or 1.0
    titles = ["layer", "", "MPD", "", *(f"{lang}: mean, cov, CKA" for lang in found["text"])]
    rows = []
    for layer in shown:
        mpd = layer["mpd"]
        cells = [str(layer["layer"]), "frozen" if layer["frozen"] else "", "-" if mpd is None else f"{mpd:.3f}"]
        cells.append("█" * round(BAR * (mpd or 0.0) / largest))
        for shift in layer["languages"].values():
            cells.append(f"{shift['mean_shift']:.3f}  {shift['covariance_shift']:.3f}  {shift['cka']:.4f}")
        rows.append(cells)
    return titles, rows


def drift_says(found: Mapping[str, Any]) -> list[str]:
    """What the table says, in sentences."""
    moved = found["parameters"]
    sentences = []
    if moved["mpd"] is None:
        sentences.append(f"No MPD: {moved['reason']}.")
    else:
        words = {
            "from-to": f"{found['from']} to {found['to']}",
            "base-from": f"base to {found['from']}",
            "base-to": f"base to {found['to']}",
        }
        pairs = {
            words[key]: (value, moved["scaled"][key]) for key, value in moved["pairs"].items() if value is not None
        }
        each = ", ".join(f"{name} {value:.3f} ({scaled:.2f})" for name, (value, scaled) in pairs.items())
        sentences.append(
            f"MPD, the mean over {moved['matrices']} weight matrices of the L2 norm of their difference "
            f"(in parentheses: relative to the largest): {each}; L2 norm of all {moved['norm']:.3f}."
        )
    for lang, text in found["text"].items():
        shifts = [layer["languages"][lang] for layer in found["layers"]]
        worst = max(range(len(shifts)), key=lambda i, s=shifts: s[i]["covariance_shift"])  # type: ignore[misc]
        least = min(range(len(shifts)), key=lambda i, s=shifts: s[i]["cka"])  # type: ignore[misc]
        sentences.append(
            f"{lang}: largest covariance shift {shifts[worst]['covariance_shift']:.3f} in layer {worst}, least CKA "
            f"{shifts[least]['cka']:.4f} in layer {least}; {text['rows']} rows, {text['tokens']:,} tokens."
        )
    return sentences


NOTE = (
    "mean: shift of the mean state in units of the states' spread; cov: relative change of their covariance "
    "(Frobenius norm); CKA: linear, 1 where states are alike up to turning and scaling"
)


def draw_drift(path: Path, found: Mapping[str, Any], title: str) -> None:
    """Write MPD, mean shift, covariance shift and 1 - CKA over the layers as an SVG file; frozen layers are grey."""
    layers = found["layers"]
    langs = list(found["text"])
    by_lang: dict[str, Callable[[Mapping[str, float]], float]] = {
        "mean shift": lambda shift: shift["mean_shift"],
        "covariance shift": lambda shift: shift["covariance_shift"],
        "1 - CKA": lambda shift: max(0.0, 1 - shift["cka"]),
    }
    panels: dict[str, list[tuple[str, list[float]]]] = {}
    if found["parameters"]["mpd"] is not None:
        panels["MPD"] = [("#888888", [layer["mpd"] for layer in layers])]
    for name, value in by_lang.items():
        panels[name] = [
            (COLOURS[i % len(COLOURS)], [value(layer["languages"][lang]) for layer in layers])
            for i, lang in enumerate(langs)
        ]
    height = 40 + len(panels) * PANEL + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{MARGIN}" y="24" font-size="14">{escape(title)}</text>',
    ]
    for i, lang in enumerate(langs):
        place = f'x="{WIDTH - MARGIN - 40 * (len(langs) - 1 - i)}" y="24" text-anchor="end"'
        parts.append(f'<text {place} fill="{COLOURS[i % len(COLOURS)]}">{escape(lang)}</text>')
    frozen = [layer["layer"] for layer in layers if layer["frozen"]]
    for number, (name, lines) in enumerate(panels.items()):
        parts += _panel(40 + number * PANEL, name, lines, frozen)
    parts.append(f'<text x="{WIDTH / 2}" y="{height - 8}" text-anchor="middle">layer</text>')
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(parts) + "\n</svg>\n")


def _panel(top: float, name: str, lines: Sequence[tuple[str, list[float]]], frozen: Sequence[int]) -> list[str]:
    count = len(lines[0][1])
    most = max(max(values) for _, values in lines) or 1.0
    low = top + PANEL - 20

    def x(layer: float) -> float:
        return MARGIN + (layer + 0.5) / count * (WIDTH - 2 * MARGIN)

    def y(value: float) -> float:
        return low - value / most * (PANEL - 44)

    width = (WIDTH - 2 * MARGIN) / count
    parts = [
        f'<rect x="{x(layer) - width / 2:.1f}" y="{top + 20}" width="{width:.1f}" height="{PANEL - 40}" '
        f'fill="#e8e8e8"><title>layer {layer} is frozen</title></rect>'
        for layer in frozen
    ]
    parts += [
        f'<path d="M{MARGIN} {top + 20}V{low}H{WIDTH - MARGIN}" fill="none" stroke="#888"/>',
        f'<text x="{MARGIN + 4}" y="{top + 16}">{name}</text>',
        f'<text x="{MARGIN - 6}" y="{y(most) + 4:.1f}" text-anchor="end">{most:.2g}</text>',
        f'<text x="{MARGIN - 6}" y="{low}" text-anchor="end">0</text>',
    ]
    parts += [
        f'<text x="{x(layer):.1f}" y="{low + 14}" text-anchor="middle">{layer}</text>'
        for layer in range(0, count, max(1, count // 10))
    ]
    for colour, values in lines:
        places = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(values))
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>')
    return parts
