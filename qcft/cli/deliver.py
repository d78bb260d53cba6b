"""Commands that run or show one stage: replay, merge, export, dial, layers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcft.cli.grouped import COMPARE, LOOK, USE
from qcft.cli.options import Freeze, Json, Quiet, Run, Runs, Set, Stage, command, show_work, watched

if TYPE_CHECKING:
    from qcft.events import Watch
    from qcft.report.shown import Delivered, Dialled


Scale = Annotated[
    float | None, typer.Option("--scale", metavar="S", help="Use this much of the phase's delta.", show_default="1")
]
By = Annotated[
    str | None,
    typer.Option("--by", metavar="layers=0-9:0.5,...", help="Scale the delta by layer; layers not named keep 1."),
]


class Base(StrEnum):
    """The weights that a phase is merged onto."""

    original = "original"
    dequantised = "dequantised"


class Dtype(StrEnum):
    """The precision of merged weights."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


@command(LOOK, "qcft replay spanish --show 3")
def replay(
    run: Run = None,
    ratio: Annotated[
        float | None,
        typer.Option("--ratio", metavar="SHARE", help="Replay's share of the mix.", show_default="the run's"),
    ] = None,
    show: Annotated[int, typer.Option("--show", metavar="N", min=0, help="Print the first N rows.")] = 0,
    left_out: Annotated[bool, typer.Option("--left-out", help="Print rows that were dropped, and why.")] = False,
    set_: Set = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show a run's replay rows. If they are missing, make them first, with the steps they depend on."""
    from qcft import api
    from qcft.cli.flags import replay_recipe
    from qcft.cli.listings import replay_shown
    from qcft.store import read_run
    from qcft.store.opened import run_again
    from qcft.terminal import tables

    recipe = replay_recipe(runs, run, ratio, set_ or [])
    with watched(quiet) as watch:
        done = api.replay_watched(recipe, runs, watch, read_run(runs, run).name)
    shown = replay_shown(done.name, done.stages, show or 5 * left_out, left_out)
    tables.show(shown, json_, tables.print_replay)
    tables.next_step(run_again(runs / done.name), quiet)


@command(USE, "qcft merge spanish --stage phase1 --to merged/")
def merge(
    run: Run = None,
    stage: Stage = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", "-o", metavar="DIR", help="Folder to write.", show_default="the run's own"),
    ] = None,
    base: Annotated[
        Base,
        typer.Option(
            "--base",
            help="Merge onto the original 16-bit weights (default), or onto the dequantised 4-bit weights (only for "
            "later use in 16 bits).",
        ),
    ] = Base.original,
    dtype: Annotated[
        Dtype | None, typer.Option("--dtype", help="Precision of the merged weights.", show_default="the base's")
    ] = None,
    scale: Scale = None,
    by: By = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge a phase (the last by default) and all phases before it into one model, and measure what the merge kept."""
    from qcft import deliveries

    def work(watch: Watch) -> Delivered:
        onto_4bit = base is Base.dequantised
        return deliveries.merge(
            run, to, runs, watch, phase=stage, dequantised=onto_4bit, dtype=dtype, scale=scale, by=by
        )

    _deliver(work, json_, quiet)


@command(USE, "qcft export spanish --to spanish-gguf/ --gguf q8_0")
def export(
    to: Annotated[Path, typer.Option("--to", "-o", metavar="DIR", help="Folder to write.")],
    run: Run = None,
    stage: Stage = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write one PEFT adapter of all phases, for the unmodified model.")
    ] = False,
    gguf: Annotated[
        str | None,
        typer.Option(
            "--gguf",
            metavar="f16|bf16|q8_0|q4_k_m",
            help="Write one GGUF file and its card instead of the 16-bit folder, for llama.cpp and Ollama, and measure "
            "how much of the gain it kept. For Llama, Mistral, Qwen 2 and 3 and Gemma 3; other models, and q4_k_m, "
            "need llama.cpp's tools.",
        ),
    ] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(
            "--llama-cpp",
            metavar="DIR",
            help="Folder of llama.cpp: use its converter and its llama-quantize.",
            show_default="the ones on PATH",
        ),
    ] = None,
    ollama: Annotated[
        str | None,
        typer.Option(
            "--ollama",
            metavar="NAME",
            help="Write a Modelfile beside the GGUF file (q8_0 unless --gguf says otherwise) and run `ollama create "
            "NAME` where Ollama is installed.",
        ),
    ] = None,
    push: Annotated[
        str | None,
        typer.Option("--push", metavar="USER/REPO", help="Upload the folder to the hub, as a private repository."),
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Make the repository of --push public.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Upload without asking for confirmation.")] = False,
    scale: Scale = None,
    by: By = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a phase's model (the last by default), its adapter or a GGUF file to a folder, with a model card."""
    from qcft import deliveries
    from qcft.models.ollama import create_command

    elsewhere = deliveries.Elsewhere(gguf, llama_cpp, ollama, push, public)
    elsewhere.check(adapter_only)
    if push is not None:
        _confirm_push(push, public, yes)

    def work(watch: Watch) -> Delivered:
        return deliveries.export(
            run, to, runs, watch, phase=stage, scale=scale, by=by, adapter_only=adapter_only, elsewhere=elsewhere
        )

    def then(done: Delivered) -> str | None:
        if ollama is None:
            return None
        return f"ollama run {ollama}" if done.get("ollama") else create_command(ollama, to)

    _deliver(work, json_, quiet, then)


@command(COMPARE, "qcft dial spanish --scales 0:1:0.25")
def dial(
    run: Run = None,
    scales: Annotated[
        str | None,
        typer.Option(
            "--scales",
            metavar="FROM:TO:STEP",
            help="Or a list: 0,0.5,1. Added to the points that the run has.",
            show_default="0:1:0.1",
        ),
    ] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by",
            metavar="layers=0-9:1,10-19:0.5|auto",
            help="Also scale the delta by range of decoder layers; layers not named, and modules outside of them, keep "
            "1. `auto` tries the lower, middle and upper third at 0.5 and 0, and the lowest and the highest sixth at "
            "0. Repeatable, one point each.",
        ),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            "--pick",
            metavar="SHARE",
            help="Pick the point with the most English among those that keep this share (e.g. 0.95) of the other "
            "languages' gain: chosen on half of the held-out rows, reported on the other half. Without --scales and "
            "--by, among the points that the run has.",
        ),
    ] = None,
    stage: Stage = None,
    method: Annotated[str | None, typer.Option("--method", help="One of PEFT's: ties, dare_linear ...")] = None,
    density: Annotated[
        float, typer.Option("--density", help="Share of the delta's values to keep (for ties, dare ...).")
    ] = 0.5,
    merge_at: Annotated[float | None, typer.Option("--merge-at", help="Merge the phase at this scale.")] = None,
    to: Annotated[Path | None, typer.Option("--to", "-o", metavar="DIR", help="Folder for the merged point.")] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score English and the other languages at several scales of a phase's delta, or by layers. Trains nothing."""
    from qcft import deliveries
    from qcft.report.curve import curve_rows
    from qcft.store.opened import runs_flag
    from qcft.terminal import tables

    def printed(done: Dialled) -> None:
        tables.print_records(curve_rows(done["points"]))
        tables.say(f"curve: {done['drawing']}", "dim")
        if picked := done.get("pick"):
            tables.print_lines(picked["said"])
            tables.print_lines([] if picked["point"] is None else [f"next: {picked['next']}"])
        tables.print_lines([done["merged"]["folder"]] if "merged" in done else [])

    def work(watch: Watch) -> Dialled:
        return deliveries.dial(
            run, scales, runs, watch, phase=stage, method=method, density=density, by=by or [], merge_at=merge_at,
            share=share, to=to,
        )  # fmt: skip

    done = show_work(work, printed, json_, quiet)
    if "merged" in done:
        tables.next_step(_use_of(done["merged"]), quiet)
    elif "pick" not in done:
        tables.next_step(f"qcft dial {done['run']} --merge-at SCALE --to DIR{runs_flag(runs)}", quiet)


@command(LOOK, "qcft layers spanish --freeze snr:0.5")
def layers(
    target: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, or a model that a phase 2 would start from.")
    ],
    freeze: Freeze = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="MODEL", help="The model it was tuned from, for most-changed and least-changed."
        ),
    ] = None,
    set_: Set = None,
    snr: Annotated[bool, typer.Option(help="Measure the signal-to-noise ratios (minutes for a large model).")] = True,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """Show for each layer whether a freeze spec freezes it, how much phase 1 changed it, and its signal-to-noise ratio.

    Trains nothing.
    """
    from qcft.cli.listings import layers_table
    from qcft.terminal import tables

    show_work(
        lambda watch: layers_table(target, runs, freeze, base, set_ or [], snr, watch), tables.print_layers, json_
    )


def _deliver(
    work: Callable[[Watch], Delivered],
    json_: bool,
    quiet: bool,
    then: Callable[[Delivered], str | None] = lambda done: None,
) -> None:
    """Do the work and print the folder, then the next step: what `then` returns, else how to load the model."""
    from qcft.terminal import tables

    done = show_work(work, lambda done: tables.print_lines([done["folder"]]), json_, quiet)
    if "pushed" in done:
        tables.say(f"uploaded: {done['pushed']}")
    tables.next_step(then(done) or _use_of(done), quiet)


def _use_of(done: Delivered) -> str:
    """How to use a model that was written."""
    card = Path(done["folder"]) / "README.md"
    return f"load it as {card} shows" if card.is_file() else "qcft export --to DIR writes it with a card"


def _confirm_push(repo: str, public: bool, yes: bool) -> None:
    """Ask in a terminal to confirm the repository's name. Raises InputError where there is no terminal, or on no."""
    from qcft.errors import InputError
    from qcft.runner.upload import check_repo

    check_repo(repo)
    if yes:
        return
    if not sys.stdin.isatty():
        raise InputError(
            f"--push {repo}: there is no terminal to confirm the name in", "add --yes if the name is right"
        )
    kind = "public, readable by everybody" if public else "private"
    try:
        sure = typer.confirm(f"Upload to {repo} ({kind})?", err=True)
    except typer.Abort:  # Ctrl-C or Ctrl-D
        sure = False
    if not sure:
        raise InputError(f"--push {repo}: not confirmed, nothing was done", "give another name, or omit --push")
