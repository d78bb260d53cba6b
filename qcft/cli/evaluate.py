"""The command that evaluates a run on benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcft.cli.grouped import RUN
from qcft.cli.options import DryRun, Json, Quiet, Run, Runs, Set, command
from qcft.cli.runs import run_and_show


@command(RUN, "qcft eval spanish --suite english --limit 200", "eval")
def evaluate(
    run: Run = None,
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", metavar="SUITE", help="english or multilingual: the paper's tasks. Repeatable."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", metavar="TASK", help="Any task of lm-eval, fidelity, or alpaca_eval. Repeatable."),
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(
            "--language",
            metavar="LANG",
            help="A language of the multilingual suite. Repeatable.",
            show_default="those trained",
        ),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            "--stage",
            metavar="STAGE",
            help="base, phase1, merged ... Repeatable.",
            show_default="the base, and each phase once",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="Items of each task.", show_default="all")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option("--shots", metavar="N", help="Examples in each prompt.", show_default="the task's"),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", metavar="N", help="Longest answer.")] = None,
    local: Annotated[
        list[str] | None,
        typer.Option(
            "--local",
            metavar="TASK=PATH",
            help="A file to use as a task's data, with the columns of the hub's. Repeatable.",
        ),
    ] = None,
    set_: Set = None,
    runs: Runs = Path("runs"),
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate a run's stages on suites and tasks. Earlier results are kept."""
    from qcft.cli.flags import eval_recipe
    from qcft.store import read_run

    chosen = {"suites": suite, "tasks": task, "languages": language, "stages": stage}
    given = {"limit": limit, "shots": shots, "max_new_tokens": max_new_tokens}
    recipe = eval_recipe(runs, run, chosen, given, local or [], set_ or [])
    run_and_show(recipe, runs, dry_run, json_, quiet, read_run(runs, run).name)
