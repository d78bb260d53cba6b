"""The command that evaluates what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcft.cli.options import DryRun, Json, Quiet, Runs, Set, app
from qcft.cli.runs import run_and_show


@app.command("eval")
def evaluate(
    run: Annotated[str | None, typer.Argument(help="Name of the run [default: the latest].")] = None,
    suite: Annotated[
        list[str] | None, typer.Option("--suite", help="english or multilingual: the paper's tasks. Repeatable.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="Any task of lm-eval, fidelity, or alpaca_eval. Repeatable."),
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option("--language", help="Of the multilingual suite [default: those trained]. Repeatable."),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option("--stage", help="base, phase1, merged ... [default: the base, and each phase once]. Repeatable."),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Items of each task.")] = None,
    shots: Annotated[int | None, typer.Option("--shots", help="Examples in each prompt [default: the task's].")] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", help="A cap on answers.")] = None,
    local: Annotated[
        list[str] | None,
        typer.Option("--local", metavar="TASK=PATH", help="A file with the hub's columns. Repeatable."),
    ] = None,
    set_: Set = None,
    runs: Runs = Path("runs"),
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate a run's stages on suites and tasks; what was evaluated before is kept."""
    from qcft.cli.flags import eval_recipe
    from qcft.store import read_run

    chosen = {"suites": suite, "tasks": task, "languages": language, "stages": stage}
    given = {"limit": limit, "shots": shots, "max_new_tokens": max_new_tokens}
    recipe = eval_recipe(runs, run, chosen, given, local or [], set_ or [])
    run_and_show(recipe, runs, dry_run, json_, quiet, read_run(runs, run).name)
