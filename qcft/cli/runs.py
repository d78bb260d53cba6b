"""Commands that run recipes and phases, and list what was run. Flags are short forms of recipe keys."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcft.cli.grouped import LOOK, RUN
from qcft.cli.options import (
    AnchorKind,
    As,
    Columns,
    Data,
    DryRun,
    Freeze,
    Json,
    Model,
    Quiet,
    RecipeName,
    Replay,
    ReplayLoss,
    Runs,
    Set,
    Take,
    Test,
    command,
    show_work,
    watched,
)

if TYPE_CHECKING:
    from qcft.cli.listings import StepListed
    from qcft.recipe import Recipe
    from qcft.report.shown import ReportWritten


@command(RUN, "qcft run quickstart --set seed=1 --as second")
def run(
    recipe: RecipeName,
    set_: Set = None,
    name: As = None,
    runs: Runs = Path("runs"),
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a whole recipe: its phases, the measurements between them, the report."""
    from qcft.recipe import load_recipe, parse_assignments
    from qcft.terminal import tables

    changes = parse_assignments(set_ or [])
    loaded = load_recipe(recipe, changes | ({} if name is None else {"name": name}))
    if loaded.ablation and not quiet:
        tables.say("this runs the recipe without its arms; `qcft ablate` runs the arms", "dim")
    run_and_show(loaded, runs, dry_run, json_, quiet)


@command(RUN, "qcft phase1 spanish --model smollm2-135m-instruct --data en.jsonl")
def phase1(
    run: Annotated[str, typer.Argument(metavar="NAME", help="Name of the run.")],
    model: Model = None,
    data: Data = None,
    adapter: Annotated[
        str | None,
        typer.Option("--adapter", metavar="FOLDER", help="A PEFT adapter to use as phase 1, instead of data."),
    ] = None,
    take: Take = None,
    columns: Columns = None,
    test: Test = None,
    freeze: Freeze = None,
    anchor: AnchorKind = None,
    set_: Set = None,
    runs: Runs = Path("runs"),
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the first phase (English, unless --data gives LANG=PATH), or import an adapter."""
    from qcft.cli.data_flags import source_keys
    from qcft.cli.flags import phase1_recipe

    keys = source_keys(take, columns)
    recipe = phase1_recipe(run, model, data or [], adapter, keys, test or [], freeze, anchor, set_ or [])
    run_and_show(recipe, runs, dry_run, json_, quiet)


@command(RUN, "qcft phase2 spanish --data es=es.jsonl --replay 0.2")
def phase2(
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="Run with a phase 1; a new name with --model.", show_default="the latest"),
    ] = None,
    model: Model = None,
    data: Data = None,
    replay: Replay = None,
    replay_loss: ReplayLoss = None,
    freeze: Freeze = None,
    anchor: AnchorKind = None,
    take: Take = None,
    columns: Columns = None,
    test: Test = None,
    set_: Set = None,
    name: As = None,
    runs: Runs = Path("runs"),
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge phase 1, add replay rows, train the second phase, and show what was gained and lost."""
    from qcft.cli.data_flags import source_keys
    from qcft.cli.flags import phase2_recipe

    keys = source_keys(take, columns)
    remedies = {"replay": replay, "replay_loss": replay_loss, "freeze": freeze, "anchor": anchor}
    recipe, of = phase2_recipe(runs, run, model, data or [], remedies, keys, test or [], name, set_ or [])
    earlier = [phase.name for phase in recipe.phases[:-1]]
    run_and_show(recipe, runs, dry_run, json_, quiet, of, earlier)


@command(LOOK, "qcft recipes --show quickstart")
def recipes(
    show: Annotated[str | None, typer.Option("--show", metavar="NAME", help="Print one recipe.")] = None,
    json_: Json = False,
) -> None:
    """List the recipes that ship with qcft."""
    from qcft.cli.listings import recipe_text, recipes_listed
    from qcft.terminal import tables

    if show:
        sys.stdout.write(recipe_text(show))
        return
    tables.show(
        recipes_listed(),
        json_,
        lambda listed: tables.print_rows(["name", "what it does"], [recipe.values() for recipe in listed]),
    )


@command(LOOK, "qcft ls")
def ls(runs: Runs = Path("runs"), json_: Json = False) -> None:
    """List the runs, the latest first, and the ablations."""
    from qcft.cli.listed import in_columns, runs_listed
    from qcft.terminal import tables

    listed = runs_listed(runs)
    if json_:
        tables.print_json(listed)
    elif listed:
        tables.print_fitting(in_columns(listed), right=("done", "English", "replay"))
        tables.print_lines(f"{one['run']}: {one['problem']}" for one in listed if one["problem"])
        tables.say(
            "English: change of NLL in nats per answer token since the first phase, or since the base in a run of one "
            "phase (above 0: worse)",
            "dim",
        )
    else:
        tables.say(f"no runs in {str(runs)!r}; start with `qcft run quickstart`")


@command(LOOK, "qcft show spanish")
def show(
    run: Annotated[
        str | None,
        typer.Argument(metavar="RUN", help="A run, or an ablation.", show_default="the latest run"),
    ] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Show a run's tables (stages by languages, evaluations) and its cost.

    For an ablation, show its arms side by side.
    """
    from qcft import api
    from qcft.store.ablations import AblationIndex, list_ablations
    from qcft.terminal import tables

    if run in list_ablations(runs):
        from qcft.terminal import ablation_view

        outcome = api.ablation_outcome(AblationIndex(runs, str(run)))
        tables.show(outcome, json_, ablation_view.print_outcome)
        return
    found = api.read(run, runs)
    cost = api.cost(found)
    terms = api.terms(found)
    if json_:
        tables.print_json({**found.table, "cost": cost, **({"terms": terms} if terms else {})})
    else:
        tables.print_table(found.table)
        tables.print_terms(terms)
        tables.print_cost(cost)


@command(LOOK, "qcft report spanish spanish-2 --to both/")
def report(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="RUN", help="Runs (several as arms).", show_default="the latest"),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", "-o", metavar="DIR", help="Folder to write.", show_default="the run's own, or report/ for several"
        ),
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Write the report of a run, or of several side by side: an HTML page, Markdown, plots and tables as files."""
    from qcft import api
    from qcft.terminal import tables
    from qcft.terminal.browser import open_page

    def printed(written: ReportWritten) -> None:
        tables.print_answer(written["question"], written["answer"])
        tables.print_lines([written["page"]])

    written = show_work(lambda watch: api.report(names or [], runs, watch, to), printed, json_)
    if open_ and open_page(Path(written["page"])):
        return
    if open_:
        tables.say("no browser could be opened: there is no display, or the program in BROWSER does not run", "yellow")
    tables.next_step(f"open {written['page']} in a browser")


def run_and_show(
    recipe: Recipe,
    runs: Path,
    dry_run: bool,
    json_: bool,
    quiet: bool,
    of: str | None = None,
    phases: Sequence[str] | None = None,
) -> None:
    """Run a recipe and print its tables, or print its steps (`dry_run`); exit code 1 if an evaluation failed.

    `of`: the run it continues, whose `phases` (all by default) are not trained again because their data changed.
    """
    from qcft import api
    from qcft.cli.listings import plan_listed
    from qcft.events import Watch
    from qcft.runner.recipe import help_train, raise_failed
    from qcft.store.opened import runs_flag
    from qcft.terminal import tables
    from qcft.training.distributed.ranks import leave, rank, world

    if dry_run:
        show_work(lambda watch: plan_listed(recipe, runs, watch), _print_steps, json_, quiet)
        return
    if rank() > 0:  # one of several processes that `accelerate launch` started
        help_train(recipe, runs, Watch())
        leave()
        os._exit(0)  # it wrote nothing and has nothing to clean up; threads of libraries would abort a normal exit
    with watched(quiet) as watch:
        done = api.run_watched(recipe, runs, watch, of, phases)
    if world() > 1:
        leave()
    if json_:
        tables.print_json({"run": done.name, "folder": str(done.folder), **done.table})
    else:
        tables.print_table(done.table)
        tables.say(f"report: {done.folder / 'report' / 'report.html'}", "dim")
    raise_failed(done)
    last = recipe.phases[-1].name
    more = f"phase2 {done.name} --data LANG=PATH --replay 0.2" if last == "phase1" else f"export {done.name} --to DIR"
    tables.next_step(f"qcft {more}{runs_flag(runs)}", quiet)


def _print_steps(steps: list[StepListed]) -> None:
    from qcft.terminal import tables

    rows = [[s["id"], s["title"] + (f": {s['replay']['in_words']}" if s["replay"] else ""), s["state"]] for s in steps]
    tables.print_rows(["step", "what", "state"], rows)
