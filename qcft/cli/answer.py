"""Commands that let stages answer prompts: side by side, or in a chat."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcft.cli.grouped import COMPARE, USE
from qcft.cli.options import Json, Quiet, Run, Runs, command, show_work, watched


@command(COMPARE, "qcft compare spanish -n 5 --lang es")
def compare(
    run: Run = None,
    other: Annotated[str | None, typer.Option("--with", metavar="RUN", help="Another run to compare with.")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", metavar="TEXT", help="A prompt. Repeatable.")] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="A text file with one prompt per line.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", "-n", metavar="N", min=1, help="Held-out rows of each language.")
    ] = None,
    lang: Annotated[
        list[str] | None, typer.Option("--lang", metavar="LANG", help="Held-out rows of this language. Repeatable.")
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(
            "--stage", metavar="STAGE", help="base, a phase or a merge. Repeatable.", show_default="base and each phase"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", metavar="N", min=1, help="Answer length.", show_default="the recipe's"),
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", metavar="FILE.html", help="Also write an HTML page.")] = None,
    runs: Runs = Path("runs"),
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the answers of several stages to the same prompts (by default of held-out rows) side by side."""
    from qcft.inspect.compare import Comparing, compare_stages
    from qcft.terminal import tables
    from qcft.terminal.compare_view import print_comparison

    asked = Comparing(run, other, stage or (), prompt or (), prompts, rows, lang or (), max_new_tokens)
    show_work(lambda watch: compare_stages(asked, runs, watch, to), print_comparison, json_, quiet)
    if to is not None:
        tables.say(f"page: {to}", "dim")


@command(USE, "qcft chat spanish --stage phase2")
def chat(
    run: Run = None,
    stage: Annotated[
        str | None,
        typer.Option("--stage", metavar="STAGE", help="base, a phase or a merge.", show_default="the last phase"),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", metavar="T", help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Limit for an answer.")
    ] = 512,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="System prompt.", show_default="the phase's")
    ] = None,
    runs: Runs = Path("runs"),
    quiet: Quiet = False,
) -> None:
    """Chat with a stage of a run. In a pipe: one prompt per line on stdin, the answers on stdout.

    /help lists the commands. Ctrl-C stops an answer, Ctrl-D quits.
    """
    from qcft.inspect.chat import Chat
    from qcft.terminal import chat_view

    typed = chat_view.is_terminal()
    with watched(quiet, stops=not typed) as watch:
        found = Chat(run, runs, watch, stage, temperature, max_new_tokens, system)
        chat_view.talk(found) if typed else chat_view.answer_lines(found, watch)
