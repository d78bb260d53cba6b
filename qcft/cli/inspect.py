"""Commands that compare: two data sets, two models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcft.cli.grouped import COMPARE
from qcft.cli.options import Json, Quiet, Run, Runs, command, show_work

if TYPE_CHECKING:
    from qcft.events import Watch
    from qcft.measure.similarity import SimilarityFound
    from qcft.report.shown import DriftShown


@command(COMPARE, "qcft similarity en.jsonl es=es.jsonl")
def similarity(
    a: Annotated[
        str, typer.Argument(metavar="A", help="[LANG=]PATH,..., RUN:PHASE, or a run (compares its last two phases).")
    ],
    b: Annotated[str | None, typer.Argument(metavar="B", help="The other data set.")] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            "--encoder", metavar="MODEL", help="Hub id or folder of a sentence encoder.", show_default="LaBSE"
        ),
    ] = None,
    take: Annotated[
        int | None, typer.Option("--take", metavar="N", min=1, help="First rows of each source.", show_default="all")
    ] = None,
    column: Annotated[
        str | None,
        typer.Option("--column", metavar="NAME", help="Column of text to compare, for records of an unknown format."),
    ] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how similar the instructions of two data sets are (DES), and say what that means for phase 2."""
    from qcft.cli.listings import similarity_table
    from qcft.report.similarity_section import similarity_rows
    from qcft.terminal import tables

    def printed(found: SimilarityFound) -> None:
        tables.print_records(similarity_rows(found))
        tables.print_lines(found["says"])

    show_work(lambda watch: similarity_table(a, b, runs, encoder, take, column, watch), printed, json_, quiet)


@command(COMPARE, "qcft drift spanish")
def drift(
    run: Run = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="STAGE",
            help="Stage to start from: base, a phase or a merge.",
            show_default="the stage the phase started from",
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="STAGE", help="Stage to end at.", show_default="the last phase"),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against", metavar="RUN", help="Compare with another run: its last phase, or its stage that --from names."
        ),
    ] = None,
    apart: Annotated[
        bool,
        typer.Option(
            "--apart", help="Train the base on the last phase's data alone, and compare that model with phase 1."
        ),
    ] = False,
    rows: Annotated[int, typer.Option("--rows", metavar="N", min=1, help="Held-out rows of each language.")] = 16,
    text: Annotated[
        list[str] | None,
        typer.Option("--text", metavar="[LANG=]FILE", help="Lines of a file instead of held-out rows. Repeatable."),
    ] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show how far a phase moved the model, layer by layer: weights (MPD) and hidden states."""
    from qcft import api
    from qcft.cli.flags import text_files
    from qcft.report.drift_section import columns_note, drift_rows, drift_says
    from qcft.store.opened import runs_flag
    from qcft.terminal import tables

    def printed(found: DriftShown) -> None:
        tables.print_rows(*drift_rows(found))
        tables.print_lines([*drift_says(found), columns_note(found)])
        tables.say(f"drawing: {found['drawing']}", "dim")

    texts = text_files(text or [])

    def work(watch: Watch) -> DriftShown:
        return api.drift(run, runs, watch, since=since, to=to, against=against, rows=rows, texts=texts, apart=apart)

    found = show_work(work, printed, json_, quiet)
    tables.next_step(f"qcft report {found['run']}{runs_flag(runs)}", quiet)
