"""Commands that keep the runs folder small."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcft.cli.grouped import KEEP
from qcft.cli.options import Json, Runs, command


@command(KEEP, "qcft gc --delete")
def gc(
    delete: Annotated[
        bool, typer.Option("--delete", help="Delete them. Without this flag they are only listed.")
    ] = False,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """List the steps that no run uses and leftovers of finished trainings; --delete removes them."""
    from dataclasses import asdict

    from qcft.store.opened import runs_flag
    from qcft.store.upkeep import remove_unused, unused_steps
    from qcft.terminal import format, tables
    from qcft.words import counted

    found, left = remove_unused(runs) if delete else (unused_steps(runs), [])
    total = sum(one.bytes for one in found)
    if json_:
        listed = {key: [asdict(one) for one in which] for key, which in (("unused", found), ("in_use_now", left))}
        tables.print_json({**listed, "bytes": total, "deleted": delete})
        return
    rows = [["/".join(filter(None, (one.step, one.part))), format.size(one.bytes), one.what] for one in found]
    if rows:
        tables.print_rows(["step", "size", "why"], rows)
    for one in left:
        tables.say(f"{one.step} was not removed: a process is using it")
    if not rows:
        tables.say("Nothing to clean up.")
        return
    what = counted(len(rows), "unused step")
    tables.say(f"{what} removed, {format.size(total)}." if delete else f"{what}, {format.size(total)}.")
    if not delete:
        tables.next_step(f"qcft gc --delete{runs_flag(runs)}")


@command(KEEP, "qcft rm spanish spanish-2")
def rm(
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="Runs, or ablations.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Also remove the runs of an ablation's arms.")] = False,
    runs: Runs = Path("runs"),
) -> None:
    """Remove runs (recipe, report and links), or an ablation with its runs.

    Their steps stay: other runs may use them, and `qcft gc` deletes unused ones.
    """
    from qcft.errors import InputError
    from qcft.store.opened import runs_flag
    from qcft.store.upkeep import remove_named, unused_steps
    from qcft.terminal import format, tables
    from qcft.words import counted

    removed = remove_named(runs, names, yes)
    for name, others in removed.items():
        if others:
            tables.say(f"kept in {runs / name}, as qcft did not write it: {', '.join(others)}")
    what = f"Removed {', '.join(map(repr, removed))}."
    try:
        unused = unused_steps(runs)
    except InputError as error:  # another run cannot be read
        tables.say(f"{what} Unused steps could not be counted: {error.message}")
        return
    size = format.size(sum(one.bytes for one in unused))
    more = f" {counted(len(unused), 'step is', 'steps are')} no longer used ({size})."
    tables.say(what + (more if unused else ""))
    tables.next_step(("qcft gc --delete" if unused else "qcft ls") + runs_flag(runs))
