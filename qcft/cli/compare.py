"""Commands that compare: two data sets, two models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcft.cli.options import Json, Quiet, Runs, app, watched


@app.command()
def similarity(
    a: Annotated[str, typer.Argument(help="[LANG=]PATH,..., RUN:PHASE, or a run: its last two phases.")],
    b: Annotated[str | None, typer.Argument(help="The other data set.")] = None,
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="Hub id or folder of a sentence encoder [default: LaBSE].")
    ] = None,
    take: Annotated[int | None, typer.Option("--take", min=1, help="Rows of each source, the first ones.")] = None,
    column: Annotated[
        str | None, typer.Option("--column", help="Column of text to compare, for records of no known format.")
    ] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how alike the instructions of two data sets are (DES), and say what that implies for phase 2."""
    from qcft import console
    from qcft.commands import similarity_table
    from qcft.report.similarity import similarity_rows

    with watched(quiet) as watch:
        found = similarity_table(a, b, runs, encoder, take, column, watch)
    if json_:
        console.print_json(found)
    else:
        console.print_rows(*similarity_rows(found))
        console.print_lines(found["says"])
