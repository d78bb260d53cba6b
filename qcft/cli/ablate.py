"""`qcft ablate`: a recipe's arms, each with several seeds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qcft.cli.grouped import RUN
from qcft.cli.options import DryRun, Json, Quiet, Runs, Set, command, show_work, watched


@command(RUN, "qcft ablate quick-ablation-cpu --dry-run")
def ablate(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe file with an ablation section, or a built-in name.")
    ],
    arms: Annotated[
        str | None,
        typer.Option("--arms", metavar="A,B", help="Only these arms, or patterns.", show_default="all"),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="0,1", help="Only these seeds.", show_default="all")
    ] = None,
    set_: Set = None,
    name: Annotated[
        str | None, typer.Option("--as", metavar="NAME", help="Name of the ablation; its runs are NAME-ARM-sSEED.")
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Run all arms in this process (a crash in one arm then stops all).")
    ] = False,
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="ray[:ADDRESS]", help="Run steps as tasks of a Ray cluster, in parallel."),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", "-l", help="List the arms, their seeds and what they set.")] = False,
    supervised: Annotated[str | None, typer.Option("--supervised", hidden=True)] = None,
    runs: Runs = Path("runs"),
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run all variants (arms) of a recipe with all seeds.

    Shared steps run once; if one arm fails, the others continue.
    """
    from qcft import api
    from qcft.ablation.dry_run import arms_listed
    from qcft.ablation.supervise import stop_with_parent, supervise
    from qcft.cli.flags import parse_seeds, split, words
    from qcft.errors import InputError
    from qcft.recipe import chosen_arms, load_ablation, parse_assignments
    from qcft.store.opened import runs_flag
    from qcft.terminal import ablation_view, tables
    from qcft.training.distributed.ranks import world

    if world() > 1:
        raise InputError("qcft ablate does not run under accelerate", "launch `qcft run` with it, one recipe at a time")
    changes = parse_assignments(set_ or []) | ({"name": name} if name else {})
    plain, every = load_ablation(recipe, changes)
    chosen = chosen_arms(every, words("--arms", arms), parse_seeds(seeds))
    if list_:
        tables.show(arms_listed(chosen), json_, ablation_view.print_arms)
        return
    if arms and chosen[0].recipe.heldout.of and not quiet:
        tables.say(
            "each arm also measures the held-out rows of the other arms' data, so that data must be available too",
            "dim",
        )
    if dry_run:
        plan = show_work(lambda watch: api.plan_ablation(chosen, runs, watch), ablation_view.print_plan, json_, quiet)
        raise typer.Exit(2 if plan["missing"] else 0)
    if not in_process and supervised is None and on is None:
        raise typer.Exit(supervise(sys.argv[1:], runs, ablation_view.report_crash))
    with watched(quiet, ablation_view.ArmsReporter) as watch, stop_with_parent(watch, supervised is not None):
        done = api.ablate_watched(plain, chosen, runs, watch, split(supervised), on)
    outcome = api.ablation_outcome(done)
    with watched(quiet) as watch:
        page = api.report([done.name], runs, watch)
    tables.show(outcome, json_, ablation_view.print_outcome)
    if not json_:
        tables.print_answer(page["question"], page["answer"])
        tables.say(f"report: {page['page']}")
    tables.next_step(f"qcft show {done.name}{runs_flag(runs)}", quiet)
    asked = {(one.arm, one.seed) for one in chosen}
    raise typer.Exit(any(run["state"] == "failed" and (run["arm"], run["seed"]) in asked for run in outcome["runs"]))
