"""What `qcft check` found, as lines of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from qcft.report.cells import left_out
from qcft.terminal.format import gib, minutes
from qcft.terminal.streams import said, stdout
from qcft.terminal.tables import print_lines, print_records, print_rows
from qcft.words import counted

if TYPE_CHECKING:
    from qcft.check.recipe import Checked
    from qcft.check.rows import Looks
    from qcft.measure.similarity import PhasesCompared

PARTS = {
    "weights": "weights in NF4",
    "constants": "their constants",
    "halves": "embeddings, head, norms in 16 bits",
    "file": "the weights' file, mapped",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "kept": "freed blocks that malloc keeps",
    "cache": "keys and values of answers",
    "total": "total",
}


def memory_table(found: Checked) -> tuple[list[str], list[list[str]]]:
    """Titles and rows: a row for each part of the memory, a column for each phase, measuring and generating."""
    columns = {phase["phase"]: phase["memory"] for phase in found["phases"]}
    for step in found["steps"]:
        if step["kind"] == "probe" and step["quantize"] == found["quantize"] and step["memory"]:
            columns.setdefault("measuring", step["memory"])
        elif step["kind"] == "replay" and step["memory"]:
            columns[f"answers for {step['phase']}"] = step["memory"]
    rows = [
        [title, *(gib(memory[key]) if memory.get(key) else "" for memory in columns.values())]
        for key, title in PARTS.items()
        if any(memory.get(key) for memory in columns.values())
    ]
    return ["memory", *columns], rows


def verdict(found: Checked) -> str:
    """In one line: whether it fits, by the phase that needs most."""
    here = {"cuda": "the GPU", "cpu": "main memory"}[found["device"]]
    size = f"{(found['vram_bytes'] or 0) / 2**30:.3g}"
    where = here if found["here"] else f"{'an' if size[0] == '8' or size in {'11', '18'} else 'a'} {size} GB card"
    most = max((phase["memory"]["total"] for phase in found["phases"]), default=0)
    usable = f"{gib(most)} of {gib(found['free_bytes'])} {'free' if found['here'] else 'usable'}"
    return f"{'fits' if found['fits'] else 'DOES NOT FIT'} {where}: {usable}"


def check_lines(found: Checked) -> list[str]:
    """The sentences under the table: whether it fits, how passes are run, time, rows left out or cut, disk."""
    where = {"cuda": "the GPU", "cpu": "main memory"}[found["device"]] if found["here"] else "such a GPU"
    lines = []
    for phase in found["phases"]:
        name, total = phase["phase"], phase["memory"]["total"]
        fits = "fits" if phase["fits"] else "DOES NOT FIT"
        lines.append(f"{name} {fits}: {gib(total)} of {gib(found['free_bytes'])} free in {where}")
        packed = f", {found['quantised_share']:.0%} in 4 bits" if found["quantize"] == "nf4" else ""
        lines.append(
            f"  adapters on {phase['adapted_share']:.0%} of the weights{packed} (embeddings and head not counted)"
        )
        if phase["unknown"]:
            lines.append(f"  activations and logits come on top: how much cannot be estimated, as {phase['unknown']}")
        how = "recomputing activations" if phase["gradient_checkpointing"] else "keeping activations"
        known = "" if phase["freeze_is_known"] else "; which layers are frozen is known only once they are measured"
        lines.append(
            f"  {counted(phase['steps'], 'optimizer step')} over {counted(phase['rows'], 'row')}, "
            f"{counted(phase['tokens'], 'token')}, "
            f"at most {phase['pass_tokens']:,} at once, {how}{known}"
        )
        if phase["terms"]:
            lines.append(f"  {phase['terms']}: a second forward pass, of the model that {name} starts from, is counted")
        if phase["replay"]:
            lines.append(f"  {phase['replay']['in_words']}")
        paced = "measured" if phase["measured"] else "from the arithmetic"
        if phase["seconds"] is not None:
            each = phase["seconds"] / phase["steps"]
            lines.append(f"  about {minutes(phase['seconds'])} to train, {each:.2g} s a step ({paced})")
        elif not found["here"]:
            lines.append("  how long it trains is not known for a GPU that is not here")
        share = phase["truncated"] / max(1, phase["rows_read"])
        dropped = left_out(phase["left_out"], "none")
        lines.append(f"  of {phase['rows_read']:,} rows left out: {dropped}; cut: {phase['truncated']} ({share:.1%})")
        if len(phase["given"]) > 1:
            given = ", ".join(f"{lang} {rows:,}" for lang, rows in phase["given"].items())
            lines.append(f"  rows that each language gives to an epoch: {given}")
        lines += [f"  {line}" for line in _looks(phase["looks"])]
    room = "" if found["disk_bytes"] <= found["disk_free_bytes"] else ": DOES NOT FIT"
    fetched = f"; the cache takes {gib(found['cache_bytes'])} more, as the weights are not here yet"
    lines.append(
        f"disk: {gib(found['disk_bytes'])} to write of {gib(found['disk_free_bytes'])} free{room}"
        f"{fetched if found['cache_bytes'] else ''}"
    )
    lines += [_similarity(one) for one in found["similarity"]]
    if not found["similarity"] and len(found["phases"]) > 1:
        lines.append("how alike the phases' instructions are (DES): no encoder is here; name one with --encoder")
    return lines


def _looks(found: Looks) -> list[str]:
    """What should be looked at among a phase's rows."""
    lines = []
    if found["positions"] is not None:
        lines.append(
            f"look at: train.max_length is {found['max_length']:,}, more than the model's {found['positions']:,} "
            f"positions; rows that are longer: {found['rows_beyond']:,}"
        )
    for rows, what, why in (
        (
            found["like_held_out"],
            "rows with the prompt of a held-out row, but for white space and case",
            "What is measured on those is too good: remove them, or give both rows the same id",
        ),
        (
            found["near_empty"],
            "rows with next to no answer (no letter or digit, or N/A)",
            "They teach the model to say that",
        ),
    ):
        if rows["rows"]:
            lines.append(f"look at: {rows['rows']:,} {what}, such as {rows['example']!r}. {why}")
    return lines


def _similarity(found: PhasesCompared) -> str:
    des, rows = found["des"], " and ".join(f"{n:,}" for n in found["des"]["rows"])
    return (
        f"{found['a']['name']} and {found['b']['name']}: DES {des['value']:.3f} [{des['low']:.3f}, {des['high']:.3f}] "
        f"by {found['encoder']['name']}, {rows} rows. {found['says'][0]} {found['remedy']}"
    )


def step_rows(found: Checked) -> list[dict[str, str]]:
    """A row for each step: what, state, time, memory it needs at most, bytes it writes."""
    return [
        {
            "step": step["title"],
            "state": step["state"],
            "training": "" if step["seconds"] is None or step["state"] == "done" else minutes(step["seconds"]),
            "memory": gib(step["memory"]["total"]) if step["memory"] else "",
            "writes": gib(step["bytes"]),
        }
        for step in found["steps"]
    ]


def print_check(found: Checked) -> None:
    """What a recipe would take, and rows with what is trained on marked: by colour, else by brackets."""
    console = stdout()
    print_lines([verdict(found)], "bold green" if found["fits"] else "bold red")
    console.print()
    print_records(step_rows(found))
    console.print()
    print_rows(*memory_table(found))
    console.print()
    for line in check_lines(found):
        print_lines([line], "bold red" if "DOES NOT FIT" in line else "")
    for phase in found["phases"]:
        for number, sample in enumerate(phase["samples"], start=1):
            console.print(said(f"\n{phase['phase']}, row {number}, what is trained on marked:", style="bold"))
            shown = Text()
            for stretch in sample:
                marked = stretch["trained"] and console.color_system is None
                text = f"[[{stretch['text']}]]" if marked else stretch["text"]
                shown.append(said(text, "black on green" if stretch["trained"] else ""))
            console.print(shown, soft_wrap=True)
