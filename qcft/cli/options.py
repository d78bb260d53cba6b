"""The app, the flags that commands share, and the watch that shows work and can stop it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

from qcft.cli.grouped import GROUPS, Grouped
from qcft.errors import InputError

if TYPE_CHECKING:
    from qcft.events import Watch
    from qcft.terminal.progress import Reporter

Thing = TypeVar("Thing")
Work = TypeVar("Work", bound=Callable[..., None])
STOPPED: dict[int, int] = {signal.SIGINT: 130, signal.SIGTERM: 143}  # exit codes
SIGHUP = getattr(signal, "SIGHUP", None)  # None on Windows
if SIGHUP is not None:
    STOPPED[SIGHUP] = 129

app = typer.Typer(
    cls=Grouped,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Rich reads `[...]` in a text as markup, and is slow to load
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Two-phase continual fine-tuning on one GPU, in 4 bits: teach a model languages and keep its English.",
    epilog="Start with: qcft run quickstart",
)


def command(group: str, example: str, name: str | None = None) -> Callable[[Work], Work]:
    """Register a command in a group of `qcft --help`, with an example at the end of its own help."""
    assert group in GROUPS
    return app.command(name, rich_help_panel=group, epilog=f"Example: {example}")


Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key, e.g. phase2.train.lr=1e-4. Repeatable."),
]


def _folder(text: str | Path) -> Path:
    """The folder of `--runs`. An empty name, as from a shell variable that is not set, is refused."""
    if not str(text).strip():
        raise InputError(f"--runs {text!r} names no folder", "give one, such as --runs runs, or omit --runs")
    return Path(text)


Runs = Annotated[
    Path,
    typer.Option(
        "--runs", "-r", envvar="QCFT_RUNS", parser=_folder, metavar="FOLDER", help="Folder that holds the runs."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Print the steps without running them.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only warnings and the result.")]
Model = Annotated[
    str | None,
    typer.Option("--model", "-m", metavar="MODEL", help="Hub id, folder, .gguf file, or smollm2-135m-instruct."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        "-d",
        metavar="[LANG=]PATH",
        help="Data set: file, folder, hub id (also ID/SPLIT@REVISION), or qcft:NAME. Repeatable, one per language.",
    ),
]
Test = Annotated[
    list[str] | None,
    typer.Option("--test", metavar="LANG=PATH", help="Your own test set: measured at every stage, never trained on."),
]
Take = Annotated[
    int | None,
    typer.Option("--take", metavar="N", help="Rows to train on from each data set.", show_default="all"),
]
Columns = Annotated[
    str | None,
    typer.Option(
        "--columns",
        metavar="A=B,...",
        help="Column names in --data and --test: instruction=question,output=answer.",
    ),
]
Freeze = Annotated[
    str | None,
    typer.Option(
        "--freeze",
        metavar="SPEC",
        help="Layers without adapters: none, first:20, random:0.5, most-changed:0.5, snr:0.5 ...",
    ),
]
Replay = Annotated[float | None, typer.Option("--replay", metavar="SHARE", help="Replay's share of the mix, e.g. 0.2.")]
ReplayLoss = Annotated[
    str | None,
    typer.Option("--replay-loss", metavar="LOSS", help="Loss on replay rows: answer or distil.", show_default="answer"),
]
Stage = Annotated[
    str | None, typer.Option("--stage", metavar="PHASE", help="Name of a phase.", show_default="the last")
]
To = Annotated[Path | None, typer.Option("--to", "-o", metavar="DIR", help="Folder to write.")]
Run = Annotated[str | None, typer.Argument(metavar="RUN", help="Name of the run.", show_default="the latest")]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or a built-in name (`qcft recipes`).")
]
AnchorKind = Annotated[
    str | None,
    typer.Option(
        "--anchor",
        metavar="KIND[:WEIGHT]",
        help="On new rows, keep the model close to the one the phase starts from: target-masked, or kl:0.01.",
    ),
]
As = Annotated[str | None, typer.Option("--as", metavar="NAME", help="Name of the new run.")]


def _print_version(asked: bool) -> None:
    if asked:
        from qcft import __version__

        typer.echo(f"qcft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (anywhere on the line).")] = False,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Run on the CPU (anywhere on the line), as QCFT_DEVICE=cpu does.")
    ] = False,
) -> None:
    """Options before any command; `main` removes --debug and --cpu from the command line."""


@contextmanager
def watched(quiet: bool, shown_by: type[Reporter] | None = None, stops: bool = True) -> Iterator[Watch]:
    """A watch that shows work on stderr and, with `stops`, stops it on Ctrl-C."""
    from qcft.events import Watch
    from qcft.terminal import progress

    reporter = (shown_by or progress.Reporter)(quiet)
    watch = Watch(reporter)
    if stops:
        handle_signals(watch)
    try:
        yield watch
    finally:
        reporter.close()


def show_work(
    work: Callable[[Watch], Thing], printed: Callable[[Thing], None], json_: bool, quiet: bool = False
) -> Thing:
    """Do watched work; print its result as JSON, or with `printed`; return it."""
    from qcft.terminal import tables

    with watched(quiet) as watch:
        found = work(watch)
    tables.show(found, json_, printed)
    return found


def handle_signals(watch: Watch) -> None:
    """The first Ctrl-C, SIGTERM or SIGHUP asks the work to stop at a safe point, the second ends it at once."""

    def handle(number: int, frame: Any) -> None:
        if watch.stop_code is not None:
            if number == SIGHUP:  # the kernel and the shell both send it
                return
            stop_at_once(number, frame)
        watch.ask_to_stop(STOPPED[number])
        sys.stderr.write("\nstopping at the next safe point (again to stop at once)\n")

    set_handler(handle)


def set_handler(handler: Callable[[int, Any], None]) -> None:
    """Set a handler for the signals that stop; SIGHUP stays ignored where `nohup` has set that."""
    for number in STOPPED:
        if number != SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def stop_at_once(number: int, frame: Any) -> NoReturn:
    """A signal handler that says how to resume, and exits; a step that is being written stays as it is, not marked
    done."""
    hint = "the same command resumes from the last finished step or checkpoint"
    sys.stderr.write(f"\nerror: stopped at once\nhint: {hint}\n")
    raise SystemExit(STOPPED[number])  # not an Exception, which a library might catch
