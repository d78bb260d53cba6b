"""The dial's curve: EA and MA over the scale of a phase's delta, as rows and as a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast

from qcft.recipe import parse_by_layer
from qcft.recipe.stages import DIAL, is_dial
from qcft.report.arms import ArmRuns, members
from qcft.report.cells import in_short
from qcft.report.document import Block, Figure, Section, Table
from qcft.report.equal_gain import equal_gain_tables
from qcft.report.plots import INK, LOWER, PAPER, UNIT, better_up_and_right, draw, label, legend_below, look
from qcft.report.standing import ENGLISH, mean_of
from qcft.store.metrics import AnswerLengths, DeltaAmount, DialMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class CurvePoint(DeltaAmount):
    """One point of the curve; mean NLL per answer token, and rows by group."""

    EA: float | None
    MA: float | None
    groups: dict[str, float]
    rows: dict[str, int]
    answers: AnswerLengths | None


AVERAGES: dict[Literal["EA", "MA"], str] = {"EA": "EA: English", "MA": "MA: other languages"}


def curve_points(metrics: Mapping[str, object]) -> list[CurvePoint]:
    """A `dial` step's points with EA and MA: mean NLL per answer token of the English groups and of the others (None
    where there are none), together with that of each group and the English answers; by scale, then those by layers."""
    found: list[CurvePoint] = []
    points = cast("DialMetrics", metrics)["points"]
    for point in sorted(points, key=lambda point: point.get("scale", float("inf"))):
        taken: DeltaAmount = {"by": point["by"]} if "by" in point else {"scale": point["scale"]}
        groups = point["groups"]
        found.append(
            {
                **taken,
                "EA": mean_of(g for g in groups.values() if g["lang"] == ENGLISH),
                "MA": mean_of(g for g in groups.values() if g["lang"] != ENGLISH),
                "groups": {name: g["nll"] for name, g in groups.items()},
                "rows": {name: g["rows"] for name, g in groups.items()},
                "answers": point["answers"],
            }
        )
    return found


def curve_rows(points: Sequence[CurvePoint]) -> list[dict[str, str]]:
    """The curve as the rows of a table."""
    return [
        {
            "scale": point_label(point),
            **{key: "-" if point[key] is None else f"{point[key]:.3f}" for key in AVERAGES},
            **{f"{name} ({points[0]['rows'][name]} rows)": f"{nll:.3f}" for name, nll in point["groups"].items()},
            "English answers": in_short(point["answers"]) if point["answers"] else "-",
        }
        for point in points
    ]


def point_label(point: DeltaAmount) -> str:
    """How much of the delta a point uses: `0.5`, `layers 0-9 at 0.5`."""
    return parse_by_layer(point["by"]).label if "by" in point else f"{point['scale']:g}"


def dial_section(arms: Sequence[ArmRuns]) -> Section | None:
    """The curve of every dial of the runs, and English at an equal gain."""
    blocks: list[Block] = []
    for arm, run in members(arms):
        for name, stage in run.run.stages.items():
            if is_dial(name):
                what = name.removeprefix(f"{DIAL}-") + (f" of {arm.label(run)}" if len(arms) > 1 else "")
                file = f"{run.run.name}-{name}" if len(arms) > 1 else name
                points = curve_points(stage.metrics)
                blocks.append(_curve(points, file, what))
                if any("by" in point for point in points):
                    blocks.append(_plane(points, f"{file}-layers", what))
                blocks.append(
                    Table.of(
                        file, f"The dial of {what}: NLL (\u2193 lower is better)", curve_rows(points), _flat(points)
                    )
                )
    blocks += equal_gain_tables(arms)
    return Section("dial", "English and the languages at each scale of a delta", tuple(blocks)) if blocks else None


def _flat(points: Sequence[CurvePoint]) -> list[dict[str, object]]:
    layers = any("by" in point for point in points)
    return [
        {
            "scale": point.get("scale"),
            **({"by": point.get("by")} if layers else {}),
            **{key: point[key] for key in AVERAGES},
            **point["groups"],
            **(point["answers"] or {}),
        }
        for point in points
    ]


def _curve(points: Sequence[CurvePoint], name: str, what: str) -> Figure:
    def body(axes: Axes) -> None:
        for i, key in enumerate(AVERAGES):
            line = [(p["scale"], nll) for p in points if "scale" in p and (nll := p[key]) is not None]
            if line:
                own = look(i)
                axes.plot(
                    [scale for scale, _ in line], [nll for _, nll in line], label=AVERAGES[key], color=own.colour,
                    marker=own.marker, linestyle=own.line,
                )  # fmt: skip
        label(axes, "scale of the delta", f"{UNIT}\n{LOWER}")

    return draw(
        name,
        f"EA and MA at each scale of the delta of {what}: mean NLL per answer token, lower is better.",
        "Curves of English and of the other languages over the scale of the delta; the numbers are in the table that "
        "follows.",
        body,
    )


def _plane(points: Sequence[CurvePoint], name: str, what: str) -> Figure:
    """EA against MA, which shows points by layers together with the curve of the scales."""

    def body(axes: Axes) -> None:
        both = [(p, ma, ea) for p in points if (ma := p["MA"]) is not None and (ea := p["EA"]) is not None]
        scales = sorted((p["scale"], ma, ea) for p, ma, ea in both if "by" not in p)
        if scales:
            ends = dict.fromkeys(f"{scale:g}" for scale, _, _ in (scales[0], scales[-1]))
            title = f"all layers at {' ... '.join(ends)}"
            axes.plot(
                [ma for _, ma, _ in scales], [ea for _, _, ea in scales], color=INK, marker=".", linestyle=":",
                label=title,
            )  # fmt: skip
        for i, (point, ma, ea) in enumerate(one for one in both if "by" in one[0]):
            own = look(i)
            axes.plot(
                ma, ea, linestyle="", marker=own.marker, color=own.colour, markeredgecolor=PAPER, markersize=8,
                label=point_label(point),
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
