"""Commands to use before a run: what a recipe needs, and whether the machine can run it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcft.cli.grouped import KEEP, LOOK
from qcft.cli.options import (
    AnchorKind,
    Data,
    Freeze,
    Json,
    Model,
    Quiet,
    Replay,
    ReplayLoss,
    Runs,
    Set,
    command,
    show_work,
)


@command(LOOK, "qcft check quickstart --vram 8GB")
def check(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A recipe file, a built-in name (`qcft recipes`), or a run."),
    ] = None,
    model: Model = None,
    data: Data = None,
    replay: Replay = None,
    replay_loss: ReplayLoss = None,
    freeze: Freeze = None,
    anchor: AnchorKind = None,
    set_: Set = None,
    vram: Annotated[
        str | None,
        typer.Option(
            "--vram", metavar="SIZE", help="Plan for a GPU of this size that is not in this machine, e.g. 8GB."
        ),
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run a few real optimizer steps and time them.")] = False,
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=0, help="Rows of each phase to print.")] = 2,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder",
            metavar="MODEL",
            help="Folder or hub id of a sentence encoder, to compare the phases' data.",
            show_default="LaBSE",
        ),
    ] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Estimate memory, time and disk of a recipe, a run or a phase 2 and show sample rows. Trains nothing."""
    from qcft.check.recipe import check_recipe
    from qcft.cli.flags import checked_recipe, parse_size
    from qcft.terminal.check_view import print_check

    remedies = {"replay": replay, "replay_loss": replay_loss, "freeze": freeze, "anchor": anchor}
    loaded = checked_recipe(runs, recipe, model, data or [], remedies, set_ or [])
    size = parse_size(vram) if vram else None
    show_work(lambda watch: check_recipe(loaded, runs, watch, size, measure, rows, encoder), print_check, json_, quiet)


@command(KEEP, "qcft doctor")
def doctor(runs: Runs = Path("runs"), json_: Json = False) -> None:
    """Check that the installation works: packages, GPU, 4-bit maths, disk, hub.

    Exit code 1 if something required is broken.
    """
    from dataclasses import asdict

    from qcft.check.doctor import examine
    from qcft.terminal import tables

    findings = examine(runs)
    if json_:
        tables.print_json([asdict(one) for one in findings])
    else:
        marks = {one.name: "ok" if one.ok else "BROKEN" if one.needed else "note" for one in findings}
        tables.print_rows(["", "what", "found"], [[marks[one.name], one.name, one.found] for one in findings])
        tables.print_lines(f"to fix {one.name}: {one.mend}" for one in findings if not one.ok)
    if any(one.needed and not one.ok for one in findings):
        raise typer.Exit(1)
