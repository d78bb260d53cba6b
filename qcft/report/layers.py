"""Layer by layer: which layers have adapters, how much each phase changed them, the measure that froze them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from qcft.report.arms import ArmRuns, Evidence
from qcft.report.cells import noise_ratio
from qcft.report.document import Block, Figure, Section, Table
from qcft.report.plots import FAINT, INK, PAPER, draw, label_layers, legend_below, look
from qcft.store.metrics import LayersFile, LayersMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LAYER = re.compile(r"\.(\d+)\.")
SHADES = 7  # of the map: few enough to distinguish


def layers_section(arms: Sequence[ArmRuns]) -> Section | None:
    """The phases of one run side by side, or the last phase of each arm."""
    first = arms[0].runs[0]
    if len(arms) == 1:
        columns = {phase: by_layer(modules) for phase, modules in first.changes.items()}
        frozen = {phase: layers_frozen_in(first, phase) for phase in columns}
    else:
        last = {arm.name: arm.runs[0].recipe.phases[-1].name for arm in arms}
        columns = {arm.name: by_layer(arm.runs[0].changes.get(last[arm.name], {})) for arm in arms}
        frozen = {arm.name: layers_frozen_in(arm.runs[0], last[arm.name]) for arm in arms}
    columns = {name: changes for name, changes in columns.items() if changes}
    if not columns:
        return None
    count = 1 + max(max((*changes, *frozen[name])) for name, changes in columns.items())
    blocks: list[Block] = [(change_bars if len(arms) == 1 else _map)(columns, frozen, count)]
    seeds = len(arms) > 1 and any(len(arm.runs) > 1 for arm in arms)
    note = " Of each arm's first seed." if seeds else ""
    blocks.append(_table(columns, frozen, count, _measured(first) if len(arms) == 1 else {}, note, len(arms) > 1))
    return Section("layers", "Layer by layer", tuple(blocks))


def by_layer(modules: Mapping[str, float]) -> dict[int, float]:
    """||s B A||_F of each decoder layer, from the squared norms of its modules; without embeddings and heads."""
    return {layer: math.sqrt(sum(squares)) for layer, squares in _of_layers(modules).items()}


def _of_layers(modules: Mapping[str, float]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for name, value in modules.items():
        if place := LAYER.search(name):
            found.setdefault(int(place[1]), []).append(value)
    return found


def layers_frozen_in(run: Evidence, phase: str) -> list[int]:
    """The layers without any adapter in a phase."""
    stage = run.run.stages.get(phase)
    return stage.training.get("frozen_layers", []) if stage and stage.training else []


def _measured(run: Evidence) -> dict[int, float]:
    """The signal-to-noise ratios that a freeze spec used, if one did: the mean of each layer's modules."""
    for stage in run.run.stages.values():
        if stage.step.startswith("layers-") and cast("LayersMetrics", stage.metrics).get("measure") == "snr":
            found = _of_layers(cast("LayersFile", stage.opened.json("layers.json"))["modules"])
            return {layer: sum(values) / len(values) for layer, values in found.items()}
    return {}


def change_bars(columns: Mapping[str, dict[int, float]], frozen: Mapping[str, list[int]], count: int) -> Figure:
    """How much each phase changed each layer, as bars; a mark under a bar: the layer was frozen."""

    def body(axes: Axes) -> None:
        wide = 0.8 / len(columns)
        for i, (name, changes) in enumerate(columns.items()):
            places = [layer - 0.4 + wide * (i + 0.5) for layer in range(count)]
            axes.bar(
                places, [changes.get(layer, 0.0) for layer in range(count)], wide, label=name,
                color=look(i).colour, hatch=look(i).hatch, edgecolor=PAPER, linewidth=0.4,
            )  # fmt: skip
        for i, (name, layers) in enumerate(frozen.items()):
            if layers:  # an empty plot would make the layout reserve space under the axes
                axes.plot(
                    layers, [0] * len(layers), linestyle="", marker="+x*1"[i % 4], markersize=5, color=INK,
                    clip_on=False, label=f"frozen in {name}", zorder=4,
                )  # fmt: skip
        axes.set_xlim(-0.7, count - 0.3)
        label_layers(axes)
        axes.set_ylabel("norm of change")
        legend_below(axes)

    return draw(
        "layers",
        "How much each phase changed each layer: the Frobenius norm of the delta that its adapter adds.",
        "Bars of the change in each layer, phase by phase; the numbers are in the table that follows.",
        body,
        height=2.8,
    )


def _map(columns: Mapping[str, dict[int, float]], frozen: Mapping[str, list[int]], count: int) -> Figure:
    most = max(max(changes.values()) for changes in columns.values())

    def body(axes: Axes) -> None:
        import numpy as np
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import BoundaryNorm
        from matplotlib.patches import Rectangle
        from matplotlib.ticker import MaxNLocator

        steps = MaxNLocator(SHADES).tick_values(0, most)
        shades = ScalarMappable(BoundaryNorm(steps, 256), "cividis")
        for row, changes in enumerate(columns.values()):
            colours = dict(zip(changes, shades.to_rgba(np.array(list(changes.values()))), strict=True))
            for layer in range(count):
                look: dict[str, Any] = {"edgecolor": FAINT, "facecolor": PAPER, "hatch": "////"}
                if layer in colours:
                    look = {"edgecolor": PAPER, "facecolor": colours[layer]}
                axes.add_patch(Rectangle((layer - 0.5, row - 0.4), 1, 0.8, linewidth=0.4, **look))
        axes.set_xlim(-0.5, count - 0.5)
        axes.set_ylim(len(columns) - 0.5, -0.5)
        axes.set_yticks(range(len(columns)), list(columns))
        axes.tick_params(left=False, labelcolor=INK)
        axes.grid(visible=False)
        label_layers(axes, "decoder layer (white, hatched: frozen)")
        bar = axes.figure.colorbar(shades, ax=axes, location="bottom", aspect=40, pad=0.02, label="norm of change")
        bar.outline.set_visible(False)

    return draw(
        "layers",
        "How much the last phase changed each layer, arm by arm: the Frobenius norm of the delta its adapter adds.",
        "A map of arms by layers; the numbers are in the table that follows.",
        body,
        height=1.6 + 0.32 * len(columns),
    )


def _table(
    columns: Mapping[str, dict[int, float]],
    frozen: Mapping[str, list[int]],
    count: int,
    snr: Mapping[int, float],
    note: str,
    of_arms: bool,
) -> Table:
    most = max(max(changes.values()) for changes in columns.values())
    places = 3 if most >= 0.1 else 6
    rows, records = [], []
    values: list[dict[str, object]] = []
    for layer in range(count):
        cells = [str(layer)]
        record: dict[str, object] = {"layer": layer}
        for name, changes in columns.items():
            change, still = changes.get(layer, 0.0), layer in frozen[name]
            cells.append("frozen" if still else f"{change:.{places}f}")
            record |= {f"{name} change": change, f"{name} frozen": still}
            own = {"arm" if of_arms else "stage": name, "measure": "norm of change", "value": change}
            values.append({**own, "layer": layer, "frozen": still})
        if snr:
            ratio = snr.get(layer)
            cells.append(noise_ratio(ratio))
            record |= {"snr": ratio}
            values.append({"measure": "signal to noise", "value": ratio, "layer": layer})
        rows.append(tuple(cells))
        records.append(record)
    head = ("layer", *columns, *(("signal to noise",) if snr else ()))
    note = f"||s B A||_F over the layer's adapted modules.{note}"
    note += " Signal to noise: the mean of the layer's modules, before the phase." if snr else ""
    title = "Norm of the change in each layer"
    return Table("layers", title, head, tuple(rows), tuple(records), note, values=tuple(values))
