"""`qcft init`: writes a recipe for your own data, from flags or from answers to questions."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from qcft.cli.grouped import LOOK
from qcft.cli.options import Data, Freeze, Model, command, watched
from qcft.errors import InputError

Value = TypeVar("Value")
EXAMPLE = "qcft init --model smollm2-135m-instruct --data es=es.jsonl"


@command(LOOK, EXAMPLE)
def init(
    model: Model = None,
    phase1: Annotated[
        list[str] | None,
        typer.Option(
            "--phase1",
            metavar="[LANG=]PATH",
            help="Data of a first phase, in English unless LANG says otherwise. Repeatable.",
            show_default="none: the model itself is phase 1",
        ),
    ] = None,
    data: Data = None,
    replay: Annotated[float, typer.Option("--replay", metavar="SHARE", help="Replay's share of the mix.")] = 0.2,
    freeze: Freeze = None,
    vram: Annotated[
        str | None,
        typer.Option("--vram", metavar="SIZE", help="Memory of the GPU, e.g. 8GB, to suggest a model for it."),
    ] = None,
    to: Annotated[Path, typer.Option("--to", "-o", metavar="FILE", help="Recipe to write.")] = Path("recipe.yaml"),
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Name of the run.", show_default="from the languages")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented recipe for your own data. In a terminal it asks for what the flags do not give."""
    from qcft.cli.flags import parse_size
    from qcft.cli.own import NONE, beside, check_free, known_model, readable, typed
    from qcft.files import write_text
    from qcft.recipe.own import OwnRecipe, suggested_model
    from qcft.terminal import tables

    check_free(to, force)
    if vram:
        parse_size(vram)
    if asks := not (model and data):
        _check_terminal(" and ".join(flag for flag, given in (("--model", model), ("--data", data)) if not given))
    with watched(quiet=False, stops=False) as watch:
        if asks and vram is None:
            answer = _asked(f"Memory of the GPU, such as 8GB ({NONE}: train on the CPU)", NONE, partial(_size, NONE))
            vram = None if answer == NONE else answer
        suggested = suggested_model(parse_size(vram) if vram else None)
        model = known_model(model) if model else _asked("Model: hub id, folder or .gguf file", suggested, known_model)
        if asks and phase1 is None:
            question = f"English data of a phase 1 ({NONE}: the model itself is phase 1)"
            first = _asked(
                question, NONE, lambda text: readable([] if text.strip() == NONE else typed(text), "en", watch)
            )
        else:
            first = readable(phase1 or [], "en", watch)
        if data:
            second = readable(data, None, watch)
        else:
            question = "Data in other languages: LANG=PATH, several separated by spaces"
            second = _asked(question, "es=qcft:passages/es", lambda text: readable(typed(text), None, watch))
    languages = "-".join(dict.fromkeys(source["lang"] for source in second))
    for source in (*first, *second):
        source["path"] = beside(source["path"], to)
    name = f"add-{languages}"[:64] if name is None else name
    own = OwnRecipe(name, beside(model, to), first, second, replay, NONE if freeze is None else freeze)
    own.recipe()  # validated before it is written
    write_text(to, own.text())
    file = shlex.quote(str(to))
    tables.say(f"wrote {file}")
    tables.next_step(f"qcft check {file}" + (f" --vram {shlex.quote(vram)}" if vram else ""))
    tables.next_step(f"qcft run {file}")


def _check_terminal(missing: str) -> None:
    if not all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr)):
        raise InputError(f"init needs {missing}, as there is no terminal to ask in", f"for example {EXAMPLE}")


def _size(none: str, text: str) -> str:
    from qcft.cli.flags import parse_size

    if text.strip() != none:
        parse_size(text)
    return text.strip()


def _asked(question: str, default: str, read: Callable[[str], Value]) -> Value:
    """The value that `read` returns for an answer; asks again if it is refused. Raises InputError for no answer."""
    from qcft.terminal.tables import print_error

    while True:
        try:
            return read(typer.prompt(question, default=default, err=True))
        except InputError as error:
            print_error(error.message, error.hint)
        except typer.Abort:
            raise InputError("init: no answer was given, nothing is written", f"or give flags: {EXAMPLE}") from None
