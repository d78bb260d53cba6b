"""Commands that keep the runs folder small."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcft.cli.grouped import KEEP
from qcft.cli.options import Json, Runs, command


@command(KEEP, "qcft gc --delete")
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Remove them; else they are only listed.")] = False,
    runs: Runs = Path("runs"),
    json_: Json = False,
) -> None:
    """List the steps that no run uses, and what finished trainings left; remove them with --delete."""
    from dataclasses import asdict

    from qcft.store.upkeep import remove_unused, unused_steps
    from qcft.terminal import format, tables

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
        tables.say(f"{one.step} was left: a process works on it")
    more = "" if delete or not rows else "; remove them with `qcft gc --delete`"
    tables.say(f"{len(rows)} {'removed' if delete else 'that no run needs'}, {format.size(total)}{more}")


@command(KEEP, "qcft rm spanish-2")
def rm(
    run: Annotated[str, typer.Argument(help="Name of the run.")],
    runs: Runs = Path("runs"),
) -> None:
    """Remove a run: its recipe, report and links. Its steps stay, for other runs or `qcft gc`."""
    from qcft.errors import InputError
    from qcft.store.upkeep import remove_run, unused_steps
    from qcft.terminal import format, tables

    others = remove_run(runs, run)
    if others:
        tables.say(f"left in {runs / run}, as qcft did not write it: {', '.join(others)}")
    try:
        unused = unused_steps(runs)
    except InputError as error:  # another run cannot be read
        tables.say(f"removed the run {run}; which steps are in no run now is not known: {error.message}")
        return
    more = f"; {len(unused)} steps ({format.size(sum(u.bytes for u in unused))}) are in no run now: `qcft gc`"
    tables.say(f"removed the run {run}{more if unused else ''}")
