"""How far the model moved: parameters and hidden states, layer by layer; and how alike the phases' instructions are.

Reads what `qcft drift` leaves in its step (drift.json) and `qcft similarity` beside the report (similarity.json).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qcft.files import read_json
from qcft.report.arms import Arm, Evidence
from qcft.report.document import Block, Figure, Prose, Section, Table
from qcft.report.plots import COLOURS, FAINT, LINES, MARKERS, draw, legend_below

SHIFTS = {"mean_shift": "mean shift", "covariance_shift": "covariance shift", "cka": "CKA"}


def drift_section(arms: Sequence[Arm]) -> Section | None:
    """A plot and a table of every drift that was measured."""
    blocks: list[Block] = []
    several = sum(len(arm.runs) for arm in arms) > 1
    for arm in arms:
        for run in arm.runs:
            for number, found in enumerate(_drifts(run)):
                name = "-".join(["drift", *([run.run.name] if several else []), *([str(number + 1)] if number else [])])
                what = f"from {found['from']} to {found['to']}" + (f", {arm.label(run)}" if several else "")
                blocks += [_plot(found, name, what), _table(found, name, what)]
    return Section("drift", "Drift", tuple(blocks)) if blocks else None


def similarity_section(arms: Sequence[Arm]) -> Section | None:
    """What `qcft similarity` said of the phases' data."""
    blocks: list[Block] = []
    for arm in arms:
        for run in arm.runs:
            found = read_json(run.run.folder / "report" / "similarity.json")
            if found:
                des = found["des"]
                value = f"DES {des['value']:.3f}, 95% interval {des['low']:.3f} to {des['high']:.3f}"
                who = f"{arm.label(run)}: " if len(arms) > 1 else ""
                by = f"{who}{found['a']['name']} and {found['b']['name']}: {value}, by {found['encoder']['name']}."
                blocks.append(Prose((by, *found["says"])))
    return Section("similarity", "How alike the phases' instructions are", tuple(blocks)) if blocks else None


def _drifts(run: Evidence) -> Iterator[Mapping[str, Any]]:
    for name, stage in run.run.stages.items():
        if name.startswith("drift/"):
            found = read_json(stage.folder / "drift.json")
            if found:
                yield found


def _plot(found: Mapping[str, Any], name: str, what: str) -> Figure:
    layers, languages = found["layers"], list(found["text"])
    numbers = [layer["layer"] for layer in layers]
    with_mpd = found["parameters"]["mpd"] is not None

    def body(panels: Any) -> None:
        panels = list(panels)
        if with_mpd:
            first = panels.pop(0)
            first.bar(numbers, [layer["mpd"] for layer in layers], color=FAINT)
            first.set_ylabel("MPD")
        for axes, (key, word) in zip(panels, SHIFTS.items(), strict=True):
            for i, lang in enumerate(languages):
                axes.plot(
                    numbers, [layer["languages"][lang][key] for layer in layers], color=COLOURS[i % len(COLOURS)],
                    linestyle=LINES[i % len(LINES)], marker=MARKERS[i % len(MARKERS)], markersize=3.5, linewidth=1.2,
                    label=lang if key == "cka" else None,
                )  # fmt: skip
            axes.set_ylabel(word)
        for axes in [*([first] if with_mpd else []), *panels]:
            for layer in layers:
                if layer["frozen"]:
                    axes.axvspan(
                        layer["layer"] - 0.5, layer["layer"] + 0.5, facecolor="none", edgecolor=FAINT, hatch="////",
                        linewidth=0, alpha=0.5, zorder=0,
                    )  # fmt: skip
        panels[-1].set_xlabel("decoder layer (hatched: frozen)")
        legend_below(panels[-1], columns=4)

    return draw(
        name,
        f"How far each layer moved {what}: its weights (MPD), and its hidden states on the same text in each language.",
        "MPD, mean shift, covariance shift and CKA over the layers; the numbers are in the table that follows.",
        body,
        height=1.6 * (3 + with_mpd) + 0.6,
        panels=3 + with_mpd,
    )


def _table(found: Mapping[str, Any], name: str, what: str) -> Table:
    rows, records = [], []
    for layer in found["layers"]:
        cells = [f"{layer['layer']}{' frozen' if layer['frozen'] else ''}"]
        cells.append("-" if layer["mpd"] is None else f"{layer['mpd']:.4f}")
        for lang, shift in layer["languages"].items():
            cells.append(f"{shift['mean_shift']:.3f}  {shift['covariance_shift']:.3f}  {shift['cka']:.4f}")
            records.append(
                {"layer": layer["layer"], "frozen": layer["frozen"], "mpd": layer["mpd"], "lang": lang, **shift}
            )
        rows.append(tuple(cells))
    texts = "; ".join(f"{lang}: {text['rows']} rows, {text['tokens']:,} tokens" for lang, text in found["text"].items())
    moved = found["parameters"]
    mpd = (
        ""
        if moved["mpd"] is None
        else f" MPD in all {moved['mpd']:.4f}, L2 norm of the difference {moved['norm']:.4f}."
    )
    return Table(
        name,
        f"Drift {what}",
        ("layer", "MPD", *(f"{lang}\nmean  cov  CKA" for lang in found["text"])),
        tuple(rows),
        tuple(records),
        "MPD: mean over the layer's matrices of the L2 norm of their difference. mean: shift of the mean state in "
        "units of the states' spread; cov: relative change of their covariance; CKA: linear, 1 where states are alike "
        f"up to turning and scaling.{mpd} {texts}.",
    )
