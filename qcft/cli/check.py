"""Commands for before anything runs: what a recipe would take, whether the machine can do it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcft.cli.options import Json, Quiet, Runs, Set, app, show_work


@app.command()
def check(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a built-in name (see `qcft recipes`).")],
    set_: Set = None,
    vram: Annotated[
        str | None, typer.Option("--vram", metavar="SIZE", help="Plan for a GPU that is not here, e.g. 8GB.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time optimizer steps that are really taken.")] = False,
    rows: Annotated[int, typer.Option("--rows", min=0, help="Rows of each phase to print.")] = 2,
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", help="Folder or hub id of a sentence encoder, to compare the phases' data [LaBSE]."),
    ] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a recipe would take: memory by part, disk, time; how alike its phases are; rows as trained on."""
    from qcft.check.recipe import check_recipe
    from qcft.cli.flags import size_of
    from qcft.recipe import load_recipe, parse_assignments
    from qcft.terminal.check_view import print_check

    loaded, size = load_recipe(recipe, parse_assignments(set_ or [])), size_of(vram) if vram else None
    show_work(lambda watch: check_recipe(loaded, runs, watch, size, measure, rows, encoder), print_check, json_, quiet)


@app.command()
def doctor(runs: Runs = Path("runs"), json_: Json = False) -> None:
    """Try what qcft rests on: packages, GPU, 4-bit products, disk, hub; exit code 1 when something needed is broken."""
    from dataclasses import asdict

    from qcft.check.doctor import examine
    from qcft.terminal import tables

    findings = examine(runs)
    if json_:
        tables.print_json([asdict(one) for one in findings])
    else:
        marks = {one.name: "ok" if one.ok else "BROKEN" if one.needed else "note" for one in findings}
        tables.print_rows(["", "what", "found"], [[marks[one.name], one.name, one.found] for one in findings])
        tables.print_lines(f"for the {one.name}: {one.mend}" for one in findings if not one.ok)
    if any(one.needed and not one.ok for one in findings):
        raise typer.Exit(1)
