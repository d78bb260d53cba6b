"""The dial's curve: EA and MA over the scale of a phase's delta, as rows and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qcft.recipe import parse_by_layer
from qcft.recipe.stages import DIAL, is_dial
from qcft.report.arms import Arm, members
from qcft.report.cells import in_short
from qcft.report.document import Block, Figure, Section, Table
from qcft.report.equal_gain import equal_gain_table
from qcft.report.plots import INK, PAPER, UNIT, better_up_and_right, draw, label, legend_below, look
from qcft.report.standing import ENGLISH, mean_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def curve_points(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each point, by its `scale` or `by` layers, with EA and MA: mean NLL per answer token of the English groups and of
    the others (None where there are none), beside each group's own and the English answers."""
    found = []
    for point in points:
        groups = point["groups"]
        found.append(
            {
                **{key: point[key] for key in ("scale", "by") if key in point},
                "EA": mean_of(g for g in groups.values() if g["lang"] == ENGLISH),
                "MA": mean_of(g for g in groups.values() if g["lang"] != ENGLISH),
                "groups": {name: g["nll"] for name, g in groups.items()},
                "rows": {name: g["rows"] for name, g in groups.items()},
                "answers": point["answers"],
            }
        )
    return found


def curve_rows(points: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The curve as the rows of a table."""
    return [
        {
            "scale": point_label(point),
            **{key: "-" if point[key] is None else f"{point[key]:.3f}" for key in ("EA", "MA")},
            **{f"{name} ({points[0]['rows'][name]} rows)": f"{nll:.3f}" for name, nll in point["groups"].items()},
            "English answers": in_short(point["answers"]) if point["answers"] else "-",
        }
        for point in points
    ]


def point_label(point: Mapping[str, Any]) -> str:
    """How much of the delta a point takes: `0.5`, `layers 0-9 at 0.5`."""
    return parse_by_layer(point["by"]).label if "by" in point else f"{point['scale']:g}"


def dial_section(arms: Sequence[Arm]) -> Section | None:
    """The curve of every dial that a run was asked for, and English at an equal gain."""
    blocks: list[Block] = []
    for arm, run in members(arms):
        for name, stage in run.run.stages.items():
            if is_dial(name):
                what = name.removeprefix(f"{DIAL}-") + (f" of {arm.label(run)}" if len(arms) > 1 else "")
                file = f"{run.run.name}-{name}" if len(arms) > 1 else name
                points = curve_points(stage.metrics["points"])
                blocks.append(_curve(points, file, what))
                if any("by" in point for point in points):
                    blocks.append(_plane(points, f"{file}-layers", what))
                blocks.append(Table.of(file, f"The dial of {what}", curve_rows(points), _flat(points)))
    if equal := equal_gain_table(arms):
        blocks.append(equal)
    return Section("dial", "English and the languages at each scale of a delta", tuple(blocks)) if blocks else None


def _flat(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    keys = ["scale", *(["by"] if any("by" in point for point in points) else []), "EA", "MA"]
    return [{**{key: p.get(key) for key in keys}, **p["groups"], **(p["answers"] or {})} for p in points]


def _curve(points: Sequence[Mapping[str, Any]], name: str, what: str) -> Figure:
    def body(axes: Axes) -> None:
        for i, (key, word) in enumerate((("EA", "EA: English"), ("MA", "MA: other languages"))):
            line = [(p["scale"], p[key]) for p in points if "scale" in p and p[key] is not None]
            if line:
                own = look(i)
                axes.plot(
                    [scale for scale, _ in line], [nll for _, nll in line], label=word, color=own.colour,
                    marker=own.marker, linestyle=own.line,
                )  # fmt: skip
        label(axes, "scale of the delta", "NLL, nats per answer token")

    return draw(
        name,
        f"EA and MA at each scale of the delta of {what}: mean NLL per answer token, lower is better.",
        "Curves of English and of the other languages over the scale of the delta; the numbers are in the table that "
        "follows.",
        body,
    )


def _plane(points: Sequence[Mapping[str, Any]], name: str, what: str) -> Figure:
    """EA against MA, where points by layers can stand beside the curve of the scales."""

    def body(axes: Axes) -> None:
        both = [point for point in points if point["EA"] is not None and point["MA"] is not None]
        scales = sorted((point for point in both if "by" not in point), key=lambda point: float(point["scale"]))
        if scales:
            ends = dict.fromkeys(f"{point['scale']:g}" for point in (scales[0], scales[-1]))
            title = f"all layers at {' ... '.join(ends)}"
            axes.plot(
                [p["MA"] for p in scales], [p["EA"] for p in scales], color=INK, marker=".", linestyle=":", label=title
            )
        for i, point in enumerate(point for point in both if "by" in point):
            own = look(i)
            axes.plot(
                point["MA"], point["EA"], linestyle="", marker=own.marker, color=own.colour, markeredgecolor=PAPER,
                markersize=8, label=point_label(point),
            )  # fmt: skip
        better_up_and_right(axes)
        legend_below(axes)

    return draw(
        name,
        f"EA against MA of the delta of {what}, scaled as a whole (line) and by layers: mean {UNIT}, on held-out rows; "
        "up and to the right is better.",
        "Scatter plot of English against the other languages at each point of the dial; the numbers are in the table "
        "that follows.",
        body,
    )
