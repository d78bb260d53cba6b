"""Drift as a table, in sentences, and as a section of the report: layer by layer, with frozen layers marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

from qcft.files import read_sealed
from qcft.measure.shifts import read_drift
from qcft.report.arms import ArmRuns, members
from qcft.report.document import Block, Figure, Prose, Section, Table
from qcft.report.plots import FAINT, draw, label_layers, legend_below, look
from qcft.store.metrics import DriftFile, DriftFound, Pair, SeedFloor, StateShift
from qcft.store.opened import DoneStep

MOST_ROWS = 12  # of a table in the terminal; --json and drift.json have every layer
BAR = 10
SHIFTS: dict[Literal["mean_shift", "covariance_shift", "cka"], str] = {
    "mean_shift": "mean shift",
    "covariance_shift": "covariance shift",
    "cka": "CKA",
}


def floor_file(run: Path, stage: str) -> Path:
    """The file for the floor of a drift's MPD: in the run's folder, not the step's, as it depends on other runs."""
    return run / "report" / f"{drift_name(stage)}-floor.json"


def found_drift(done: DoneStep, run: Path, stage: str) -> DriftFound:
    """The results of a done drift, and the floor of its MPD, which is stored in the run's report folder."""
    return {**read_drift(done), "floor": cast("SeedFloor | None", read_sealed(floor_file(run, stage)))}


def drift_rows(found: DriftFile) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: MPD with a bar, and for each language mean shift, covariance shift and CKA."""
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
        rows.append(cells + [_shift(shift) for shift in layer["languages"].values()])
    return titles, rows


def drift_says(found: DriftFound) -> list[str]:
    """The results in sentences."""
    moved = found["parameters"]
    sentences = []
    if moved["mpd"] is None:
        sentences.append(f"No MPD: {moved['reason']}.")
    else:
        words: dict[Pair, str] = {
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
            f"(in parentheses: relative to the largest): {each}; L2 norm over all of them {moved['norm']:.3f}."
        )
        sentences.append(_floor(found["floor"]))
    for lang, text in found["text"].items():
        shifts = [layer["languages"][lang] for layer in found["layers"]]
        covariances, ckas = [shift["covariance_shift"] for shift in shifts], [shift["cka"] for shift in shifts]
        worst, least = covariances.index(max(covariances)), ckas.index(min(ckas))
        sentences.append(
            f"{lang}: largest covariance shift {shifts[worst]['covariance_shift']:.3f} in layer {worst}, smallest CKA "
            f"{shifts[least]['cka']:.4f} in layer {least}; {text['rows']} rows, {text['tokens']:,} tokens."
        )
    return sentences


def _floor(floor: SeedFloor | None) -> str:
    """The MPD of two seeds of one training, in a sentence."""
    if floor is None:
        return "Its floor, the MPD of two seeds of one training, was not measured; `qcft drift` looks for it."
    what = f"the MPD of two seeds of {floor['phase']}'s training" if floor["phase"] else "the MPD of two seeds"
    if floor["mpd"] is not None:
        runs = floor["runs"]
        of = f"; against {runs[0]}" if len(runs) == 1 else f"; mean against {len(runs)} runs: {', '.join(runs)}"
        return f"Its floor, {what}, is {floor['mpd']:.3f}: the seed alone causes this much{of}."
    if floor["measure"]:
        return f"Its floor, {what}, was not measured: run `{floor['measure']}`, then `qcft drift` again."
    return f"Its floor, {what}, is not known: there is no training of plain LoRA to repeat."


def columns_note(found: DriftFile) -> str:
    """The meaning of the columns."""
    cka = (
        "debiased and linear, 1 where states are equal up to rotation and scale, 0 where they are unrelated"
        if found.get("cka") == "debiased"
        else "linear, not debiased: far above 0 for unrelated states if tokens are few; `qcft drift` measures it again"
    )
    return (
        "mean: shift of the mean state, in units of the states' spread; cov: relative change of their covariance "
        f"(Frobenius norm); CKA: {cka}"
    )


def drift_section(arms: Sequence[ArmRuns]) -> Section | None:
    """A plot and a table of every measured drift."""
    blocks: list[Block] = []
    several = len(members(arms)) > 1
    for arm, run in members(arms):
        for stage, done in run.run.stages.items():
            if stage.startswith("drift/"):
                found = found_drift(done.opened, run.run.folder, stage)
                name = drift_name(stage) + (f"-{run.run.name}" if several else "")
                what = f"from {found['from']} to {found['to']}" + (f", {arm.label(run)}" if several else "")
                blocks += [Prose(tuple(drift_says(found))), _plot(found, name, what), _table(found, name, what)]
    return Section("drift", "Drift", tuple(blocks)) if blocks else None


def drift_name(stage: str) -> str:
    """The name of a drift's plot and table in the report of its run."""
    return stage.replace("/", "-")


def _plot(found: DriftFile, name: str, what: str) -> Figure:
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
                own = look(i)
                axes.plot(
                    numbers, [layer["languages"][lang][key] for layer in layers], color=own.colour,
                    linestyle=own.line, marker=own.marker, markersize=3.5, linewidth=1.2,
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
        label_layers(panels[-1], "decoder layer (hatched: frozen)")
        panels[-1].figure.align_ylabels()
        legend_below(panels[-1], columns=4)

    return draw(
        name,
        f"How far each layer moved {what}: its weights (MPD), and its hidden states on the same text in each language.",
        "MPD, mean shift, covariance shift and CKA over the layers; the numbers are in the table that follows.",
        body,
        height=1.6 * (3 + with_mpd) + 0.4,
        panels=3 + with_mpd,
    )


def _table(found: DriftFile, name: str, what: str) -> Table:
    rows, records = [], []
    for layer in found["layers"]:
        rows.append(
            {
                "layer": f"{layer['layer']}{' frozen' if layer['frozen'] else ''}",
                "MPD": "-" if layer["mpd"] is None else f"{layer['mpd']:.4f}",
                **{f"{lang}\nmean  cov  CKA": _shift(shift) for lang, shift in layer["languages"].items()},
            }
        )
        own = {"layer": layer["layer"], "frozen": layer["frozen"], "mpd": layer["mpd"]}
        records += [{**own, "lang": lang, **shift} for lang, shift in layer["languages"].items()]
    meaning = f"MPD: mean over the layer's matrices of the L2 norm of their difference; {columns_note(found)}."
    return Table.of(name, f"Drift {what}", rows, records, meaning)


def _shift(shift: StateShift) -> str:
    return f"{shift['mean_shift']:.3f}  {shift['covariance_shift']:.3f}  {shift['cka']:.4f}"
