"""The command line. Flags are sugar for recipe keys; every body is a few lines."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from qcft.events import Watch
    from qcft.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Two-phase continual fine-tuning on one GPU, in 4 bits: teach a model languages and keep its English.",
    epilog="Start with: qcft run quickstart",
)

Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key, e.g. phase2.train.lr=1e-4. Repeatable."),
]
Runs = Annotated[Path, typer.Option("--runs", envvar="QCFT_RUNS", help="Folder that holds the runs.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the steps and do nothing.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only warnings and the result.")]
Model = Annotated[str | None, typer.Option("--model", help="Hub id, folder, .gguf file, or smollm2-135m-instruct.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="[LANG=]PATH",
        help="Data set: file, folder, hub id, or qcft:NAME. Repeatable, one per language.",
    ),
]
Take = Annotated[int | None, typer.Option("--take", help="Rows to train on from each data set.")]
Freeze = Annotated[
    str | None,
    typer.Option("--freeze", help="Layers without adapters: none, first:20, random:0.5, most-changed:0.5, snr:0.5 ..."),
]
Stage = Annotated[str | None, typer.Option("--stage", metavar="PHASE", help="Name of a phase [default: the last].")]
As = Annotated[str | None, typer.Option("--as", metavar="NAME", help="Name of the run to make.")]


class Base(StrEnum):
    """What a merge goes onto."""

    original = "original"
    dequantised = "dequantised"


class Dtype(StrEnum):
    """Of merged weights."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def _print_version(asked: bool) -> None:
    if asked:
        from qcft import __version__

        typer.echo(f"qcft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (anywhere on the line).")] = False,
) -> None:
    """Options before any command; --debug is taken out of the line in `main`."""


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a built-in name (see `qcft recipes`).")],
    set_: Set = None,
    name: As = None,
    runs: Runs = Path("runs"),
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a whole recipe: its phases, what is measured between them, the report."""
    from qcft.recipe import load_recipe, parse_assignments

    changes = parse_assignments(set_ or [])
    _run(load_recipe(recipe, changes | ({"name": name} if name else {})), runs, dry_run, json_, quiet)


@app.command()
def phase1(
    run: Annotated[str, typer.Argument(help="Name of the run.")],
    model: Model = None,
    data: Data = None,
    adapter: Annotated[
        str | None, typer.Option("--adapter", help="A PEFT adapter to take as phase 1, instead of data.")
    ] = None,
    take: Take = None,
    freeze: Freeze = None,
    set_: Set = None,
    runs: Runs = Path("runs"),
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the first phase (English, unless --data says LANG=PATH), or take in an adapter."""
    from qcft.commands import phase1_recipe

    recipe = phase1_recipe(run, model, data or [], adapter, take, freeze, set_ or [])
    _run(recipe, runs, dry_run, json_, quiet)


@app.command()
def phase2(
    run: Annotated[
        str | None, typer.Argument(help="Run with a phase 1 [default: the latest]; a new name with --model.")
    ] = None,
    model: Model = None,
    data: Data = None,
    replay: Annotated[float | None, typer.Option("--replay", help="Replay's share of the mix, e.g. 0.2.")] = None,
    freeze: Freeze = None,
    take: Take = None,
    set_: Set = None,
    name: As = None,
    runs: Runs = Path("runs"),
    dry_run: DryRun = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge phase 1, mix in replay, train the second phase, and show what was gained and lost."""
    from qcft.commands import phase2_recipe

    recipe = phase2_recipe(runs, run, model, data or [], replay, freeze, take, name, set_ or [])
    _run(recipe, runs, dry_run, json_, quiet)


@app.command()
def replay(
    run: Annotated[str | None, typer.Argument(help="Name of the run [default: the latest].")] = None,
    ratio: Annotated[float | None, typer.Option("--ratio", help="Another share of the mix than the run's.")] = None,
    show: Annotated[int, typer.Option("--show", metavar="N", min=0, help="Print the first N rows.")] = 0,
    left_out: Annotated[bool, typer.Option("--left-out", help="Print rows that were left out, and why.")] = False,
    set_: Set = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a run's replay rows; make them first, with what they rest on, where they are not made yet."""
    from qcft import api, console
    from qcft.commands import replay_recipe, replay_shown

    recipe = replay_recipe(runs, run, ratio, set_ or [])
    with _watched(quiet) as watch:
        done = api.replay_watched(recipe, runs, watch)
    stages = {name: stage.folder for name, stage in done.stages.items()}
    shown = replay_shown(done.name, stages, show or 5 * left_out, left_out)
    if json_:
        console.print_json(shown)
    else:
        console.print_replay(shown)


@app.command()
def merge(
    run: Annotated[str | None, typer.Argument(help="Name of the run [default: the latest].")] = None,
    stage: Stage = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Folder to write [default: runs/RUN].")] = None,
    base: Annotated[
        Base, typer.Option("--base", help="Onto the 16-bit weights, or what 4 bits made of them (16-bit use only).")
    ] = Base.original,
    dtype: Annotated[Dtype | None, typer.Option("--dtype", help="Of the weights [default: the base's].")] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge a phase (the last by default), with all before it, into one model; measure what that kept."""
    from qcft import api

    onto_4bit = base is Base.dequantised
    _deliver(lambda w: api.merge(run, to, runs, w, phase=stage, dequantised=onto_4bit, dtype=dtype), json_, quiet)


@app.command()
def export(
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder to write.")],
    run: Annotated[str | None, typer.Argument(help="Name of the run [default: the latest].")] = None,
    stage: Stage = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="One PEFT adapter for the model as it came.")
    ] = False,
    runs: Runs = Path("runs"),
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a phase's model (the last by default) or its adapter to a folder, with a model card."""
    from qcft import api

    if adapter_only:
        _deliver(lambda watch: api.export_adapter(run, to, runs, watch, phase=stage), json_, quiet)
    else:
        _deliver(lambda watch: api.merge(run, to, runs, watch, phase=stage), json_, quiet)


@app.command()
def dial(
    run: Annotated[str | None, typer.Argument(help="Name of the run [default: the latest].")] = None,
    scales: Annotated[str, typer.Option("--scales", metavar="FROM:TO:STEP", help="Or a list: 0,0.5,1.")] = "0:1:0.1",
    stage: Stage = None,
    method: Annotated[str | None, typer.Option("--method", help="One of PEFT's: ties, dare_linear ...")] = None,
    density: Annotated[float, typer.Option("--density", help="Share of a delta's numbers a method keeps.")] = 0.5,
    merge_at: Annotated[float | None, typer.Option("--merge-at", help="Merge the phase at this scale.")] = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="DIR", help="Folder for the merged point.")] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score English and the other languages at each scale of a phase's delta, without training."""
    from qcft import api, console
    from qcft.report.curve import curve_rows

    how: dict[str, Any] = {"phase": stage, "method": method, "density": density, "merge_at": merge_at, "to": to}
    with _watched(quiet) as watch:
        done = api.dial(run, scales, runs, watch, **how)
    if json_:
        console.print_json(done)
    else:
        console.print_rows(*curve_rows(done["points"]))
        console.stderr().print(f"curve: {done['drawing']}", style="dim", soft_wrap=True)
        if "merged" in done:
            sys.stdout.write(f"{done['merged']['folder']}\n")


@app.command()
def recipes(
    show: Annotated[str | None, typer.Option("--show", metavar="NAME", help="Print one recipe.")] = None,
    json_: Json = False,
) -> None:
    """List the recipes that ship with qcft."""
    from qcft import console
    from qcft.commands import recipe_text, recipes_listed

    if show:
        sys.stdout.write(recipe_text(show))
        return
    listed = recipes_listed()
    if json_:
        console.print_json(listed)
    else:
        console.print_rows(["name", "what it does"], [[r["name"], r["about"]] for r in listed])


@app.command()
def layers(
    target: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, or a model as phase 2 would start from.")
    ],
    freeze: Freeze = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="The model this one was tuned from, for most-changed and least-changed."),
    ] = None,
    set_: Set = None,
    snr: Annotated[bool, typer.Option(help="Measure the signal-to-noise ratios (minutes for a large model).")] = True,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Show which layers a freeze spec leaves free, what phase 1 changed and their signal to noise. Trains nothing."""
    from qcft import console
    from qcft.commands import layers_table

    with _watched(False) as watch:
        table = layers_table(target, runs, freeze, base, set_ or [], snr, watch)
    console.print_json(table) if json_ else console.print_layers(table)


@app.command()
def ls(runs: Runs = Path("runs"), json_: Json = False) -> None:
    """List the runs, the latest first."""
    from qcft import console
    from qcft.commands import runs_listed

    listed = runs_listed(runs)
    if json_:
        console.print_json(listed)
    else:
        console.print_rows(["run", "model", "phases", "steps done"], [list(r.values()) for r in listed])


@app.command()
def show(
    run: Annotated[str | None, typer.Argument(help="Name of the run [default: the latest].")] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Show a run's table of stages and languages."""
    from qcft import api, console

    found = api.read(run, runs)
    if json_:
        console.print_json(found.table)
    else:
        console.print_table(found.table)


def main() -> NoReturn:
    """The `qcft` command: errors as two lines, exit codes 0, 1, 2, 130 and 143."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    from qcft.errors import QcftError

    try:
        code = app(standalone_mode=False)
    except QcftError as error:
        if debug:
            raise
        _fail(error.message, error.hint, error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", "the same command goes on from the last whole step or checkpoint", 130)
    except Exception as error:  # the last line of defence between a user and a traceback
        if hasattr(error, "format_message"):  # a mistake on the command line; Typer's versions share no class for it
            _usage_error(error)
        if debug:
            raise
        text = f"{type(error).__name__}: {error}"
        _fail(f"unexpected {text[:300]}", "what was done is kept; run again with --debug to see where it comes from", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _usage_error(error: Any) -> NoReturn:
    """A mistake on the command line, told like any other."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed already
        sys.exit(0)
    command = context.command_path if context else "qcft"
    _fail(error.format_message(), f"see `{command} --help`", 2)


def _run(recipe: Recipe, runs: Path, dry_run: bool, json_: bool, quiet: bool) -> None:
    from qcft import api, console
    from qcft.commands import plan_listed

    if dry_run:
        with _watched(quiet) as watch:
            steps = plan_listed(recipe, runs, watch)
        if json_:
            console.print_json(steps)
        else:
            console.print_rows(["step", "what", "state"], [[s["id"], s["title"], s["state"]] for s in steps])
        return
    with _watched(quiet) as watch:
        done = api.run_watched(recipe, runs, watch)
    if json_:
        console.print_json({"run": done.name, "folder": str(done.folder), **done.table})
    else:
        console.print_table(done.table)
        console.stderr().print(f"report: {done.folder / 'report' / 'report.md'}", style="dim", soft_wrap=True)


@contextmanager
def _watched(quiet: bool) -> Iterator[Watch]:
    """Work that is shown on stderr and hears Ctrl-C."""
    from qcft import console
    from qcft.events import Watch

    reporter = console.Reporter(quiet)
    watch = Watch(reporter)
    _hear_signals(watch)
    try:
        yield watch
    finally:
        reporter.close()


def _deliver(work: Callable[[Watch], dict[str, Any]], json_: bool, quiet: bool) -> None:
    from qcft import console

    with _watched(quiet) as watch:
        done = work(watch)
    if json_:
        console.print_json(done)
    else:
        sys.stdout.write(f"{done['folder']}\n")


def _hear_signals(watch: Watch) -> None:
    """The first Ctrl-C or SIGTERM asks the work to stop at a safe point, the second ends it at once."""

    from qcft.errors import Interrupted

    def handle(number: int, frame: Any) -> None:
        code = 143 if number == signal.SIGTERM else 130
        if watch.stop_code is not None:
            raise Interrupted(
                "stopped at once", "the same command goes on from the last whole step or checkpoint", code
            )
        watch.ask_to_stop(code)
        sys.stderr.write("\nstopping at the next safe point (again to stop at once)\n")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def _fail(message: str, hint: str, code: int) -> NoReturn:
    from qcft.console import print_error

    print_error(message, hint)
    sys.exit(code)
