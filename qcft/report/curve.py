"""The dial's curve: EA and MA over the scale of a phase's delta, as rows and as an SVG drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from qcft.files import write_text

ENGLISH = "en"
WIDTH, HEIGHT, MARGIN = 640, 360, 56
COLOURS = {"EA": "#1f5fa8", "MA": "#c0392b"}


def curve_points(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each scale with EA and MA: mean NLL per answer token of the English groups and of the others (None where there
    are none), beside each group's own and the English answers."""
    found = []
    for point in points:
        groups = point["groups"]
        found.append(
            {
                "scale": point["scale"],
                "EA": _mean([g for g in groups.values() if g["lang"] == ENGLISH]),
                "MA": _mean([g for g in groups.values() if g["lang"] != ENGLISH]),
                "groups": {name: g["nll"] for name, g in groups.items()},
                "rows": {name: g["rows"] for name, g in groups.items()},
                "answers": point["answers"],
            }
        )
    return found


def curve_rows(points: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The curve as a table: titles and rows."""
    names = list(points[0]["groups"])
    titles = ["scale", "EA", "MA", *(f"{name} ({points[0]['rows'][name]} rows)" for name in names), "English answers"]
    rows = []
    for point in points:
        cells = [f"{point['scale']:g}", _cell(point["EA"]), _cell(point["MA"])]
        cells += [f"{point['groups'][name]:.3f}" for name in names]
        answers = point["answers"]
        rows.append(
            [*cells, f"{answers['mean_tokens']:.0f} tokens, {answers['finished']:.0%} done" if answers else "-"]
        )
    return titles, rows


def draw_curve(path: Path, points: Sequence[Mapping[str, Any]], title: str) -> None:
    """Write the curve as an SVG file; lower is better."""
    lines = {key: [(p["scale"], p[key]) for p in points if p[key] is not None] for key in ("EA", "MA")}
    values: list[float] = [value for line in lines.values() for _, value in line]
    scales: list[float] = [p["scale"] for p in points]
    across: tuple[float, float] = (min(scales), max(scales))
    up: tuple[float, float] = (min(values), max(values))

    def x(scale: float) -> float:
        return MARGIN + (scale - across[0]) / ((across[1] - across[0]) or 1) * (WIDTH - 2 * MARGIN)

    def y(value: float) -> float:
        return HEIGHT - MARGIN - (value - up[0]) / ((up[1] - up[0]) or 1) * (HEIGHT - 2 * MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{MARGIN}" y="24" font-size="14">{escape(title)}: NLL over the scale of its delta</text>',
        f'<path d="M{MARGIN} {MARGIN}V{HEIGHT - MARGIN}H{WIDTH - MARGIN}" fill="none" stroke="#888"/>',
    ]
    parts += [
        f'<text x="{x(s):.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{s:g}</text>'
        for s in scales[:: max(1, len(scales) // 11)]
    ]
    parts += [f'<text x="{MARGIN - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.2f}</text>' for v in sorted(set(up))]
    for number, (key, line) in enumerate(lines.items()):
        if line:
            places = " ".join(f"{x(s):.1f},{y(v):.1f}" for s, v in line)
            parts.append(f'<polyline points="{places}" fill="none" stroke="{COLOURS[key]}" stroke-width="2"/>')
            parts += [f'<circle cx="{x(s):.1f}" cy="{y(v):.1f}" r="3" fill="{COLOURS[key]}"/>' for s, v in line]
            word = "English (EA)" if key == "EA" else "other languages (MA)"
            place = f'x="{WIDTH - MARGIN}" y="{24 + 16 * number}" text-anchor="end"'
            parts.append(f'<text {place} fill="{COLOURS[key]}">{word}</text>')
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(parts) + "\n</svg>\n")


def _mean(groups: Sequence[Mapping[str, Any]]) -> float | None:
    tokens = sum(g["answer_tokens"] for g in groups)
    return sum(g["nll"] * g["answer_tokens"] for g in groups) / tokens if tokens else None


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
