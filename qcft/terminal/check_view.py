"""What `qcft check` found, as lines of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from qcft.report.cells import reasons_in_words
from qcft.terminal.format import gib, remaining
from qcft.terminal.streams import said, stdout
from qcft.terminal.tables import print_lines, print_records, print_rows
from qcft.words import counted

if TYPE_CHECKING:
    from qcft.check.recipe import Checked
    from qcft.check.rows import Looks
    from qcft.measure.similarity import PhasesCompared

PARTS = {
    "weights": "weights in NF4",
    "constants": "quantization constants",
    "halves": "weights in 16 bits",
    "file": "weights file, memory-mapped",
    "adapters": "adapters",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "kept": "freed blocks kept by the allocator",
    "cache": "KV cache of answers",
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


def fit_line(found: Checked) -> str:
    """In one line: whether it fits, by the phase that needs the most memory."""
    here = {"cuda": "the GPU", "cpu": "in RAM"}[found["device"]]
    where = here if found["here"] else _a_card((found["vram_bytes"] or 0) / 2**30)
    most = max((phase["memory"]["total"] for phase in found["phases"]), default=0)
    usable = f"{gib(most)} of {gib(found['free_bytes'])} {'free' if found['here'] else 'usable'}"
    return f"{'fits' if found['fits'] else 'DOES NOT FIT'} {where}: {usable}"


def _a_card(gigabytes: float) -> str:
    """`an 8 GB GPU`, `a 24 GB GPU`."""
    size = f"{gigabytes:.3g}"
    return f"{'an' if size[0] == '8' or size in {'11', '18'} else 'a'} {size} GB GPU"


def check_lines(found: Checked) -> list[str]:
    """The sentences under the table: whether it fits, how passes are run, time, rows dropped or truncated, disk."""
    lines = []
    for phase in found["phases"]:
        name, total = phase["phase"], phase["memory"]["total"]
        fits = "fits" if phase["fits"] else "DOES NOT FIT"
        lines.append(f"{name} {fits}: needs {gib(total)} of {_available(found)}")
        packed = f", {found['quantised_share']:.0%} in 4 bits" if found["quantize"] == "nf4" else ""
        lines.append(
            f"  adapters on {phase['adapted_share']:.0%} of the weights{packed} (embeddings and head not counted)"
        )
        if phase["unknown"]:
            lines.append(f"  activations and logits need more: how much cannot be estimated, as {phase['unknown']}")
        how = "recomputing activations" if phase["gradient_checkpointing"] else "keeping activations"
        known = "" if phase["freeze_is_known"] else "; which layers are frozen is known only after they are measured"
        lines.append(
            f"  {counted(phase['steps'], 'optimizer step')} over {counted(phase['rows'], 'row')}, "
            f"{counted(phase['tokens'], 'token')}, "
            f"at most {phase['pass_tokens']:,} at once, {how}{known}"
        )
        if phase["terms"]:
            lines.append(f"  {phase['terms']}: a second forward pass, of the model that {name} starts from, is counted")
        if text := phase["raw_text"]:
            lines.append(
                f"  raw text, without a chat template: {counted(text['documents'], 'document')} in "
                f"{counted(text['rows'], 'row')} of at most {phase['looks']['max_length']:,} tokens"
            )
        if phase["replay"]:
            lines.append(f"  {phase['replay']['in_words']}")
        source = "measured" if phase["measured"] else "estimated"
        if phase["seconds"] is not None:
            each = phase["seconds"] / phase["steps"]
            lines.append(f"  about {_about(phase['seconds'])} to train, {each:.2g} s per step ({source})")
        elif not found["here"]:
            lines.append("  training time: unknown (run this on the GPU itself to get an estimate)")
        dropped = sum(phase["left_out"].values())
        reasons = f" ({reasons_in_words(phase['left_out'], '')})" if dropped else ""
        lines.append(
            f"  rows: {phase['rows_read']:,} read, {dropped:,} dropped{reasons}, {phase['truncated']:,} truncated"
        )
        if len(phase["given"]) > 1:
            given = ", ".join(f"{lang} {rows:,}" for lang, rows in phase["given"].items())
            lines.append(f"  rows of each language per epoch: {given}")
        lines += [f"  {line}" for line in _looks(phase["looks"])]
    room = "" if found["disk_bytes"] <= found["disk_free_bytes"] else ": DOES NOT FIT"
    fetched = f"; the cache needs {gib(found['cache_bytes'])} more, as the weights are not downloaded yet"
    lines.append(
        f"disk: {gib(found['disk_bytes'])} to write of {gib(found['disk_free_bytes'])} free{room}"
        f"{fetched if found['cache_bytes'] else ''}"
    )
    lines += [_similarity(one) for one in found["similarity"]]
    if not found["similarity"] and len(found["phases"]) > 1:
        lines.append(
            "data similarity (DES): not measured; install the extra 'similarity' and give --encoder FOLDER_OR_HUB_ID"
        )
    return lines


def _available(found: Checked) -> str:
    """The memory that training can use, and where."""
    free = f"the {gib(found['free_bytes'])}"
    if not found["here"]:
        size = (found["vram_bytes"] or 0) / 2**30
        return f"{free} usable on {_a_card(size)} ({gib(size * 2**30 - found['free_bytes'])} is kept for CUDA)"
    return f"{free} free {'on the GPU' if found['device'] == 'cuda' else 'in RAM'}"


def _looks(found: Looks) -> list[str]:
    """What a person should check among a phase's rows."""
    lines = []
    if found["positions"] is not None:
        lines.append(
            f"check: train.max_length is {found['max_length']:,}, more than the model's {found['positions']:,} "
            f"positions; rows that are longer: {found['rows_beyond']:,}"
        )
    for rows, what, why in (
        (
            found["like_held_out"],
            "rows with the prompt of a held-out row, except for white space and case",
            "Measurements on those are too good: remove them, or give both rows the same id",
        ),
        (
            found["near_empty"],
            "rows with an almost empty answer (no letter or digit, or N/A)",
            "They teach the model to answer like that",
        ),
    ):
        if rows["rows"]:
            lines.append(f"check: {rows['rows']:,} {what}, such as {rows['example']!r}. {why}")
    return lines


def _similarity(found: PhasesCompared) -> str:
    des, rows = found["des"], " and ".join(f"{n:,}" for n in found["des"]["rows"])
    return (
        f"{found['a']['name']} and {found['b']['name']}: DES {des['value']:.3f} [{des['low']:.3f}, {des['high']:.3f}] "
        f"by {found['encoder']['name']}, {rows} rows. {found['says'][0]} {found['remedy']}"
    )


def step_rows(found: Checked) -> list[dict[str, str]]:
    """A row for each step: title, state, time, peak memory, bytes it writes."""
    return [
        {
            "step": step["title"],
            "state": step["state"],
            "training": "" if step["seconds"] is None or step["state"] == "done" else _about(step["seconds"]),
            "memory": gib(step["memory"]["total"]) if step["memory"] else "",
            "writes": gib(step["bytes"]),
        }
        for step in found["steps"]
    ]


def print_check(found: Checked) -> None:
    """What a recipe needs, and sample rows with the trained text marked: by colour, else by brackets."""
    console = stdout()
    print_lines([fit_line(found)], "bold green" if found["fits"] else "bold red")
    console.print()
    print_records(step_rows(found))
    console.print()
    print_rows(*memory_table(found))
    console.print()
    for line in check_lines(found):
        print_lines([line], "bold red" if "DOES NOT FIT" in line else "")
    for phase in found["phases"]:
        for number, sample in enumerate(phase["samples"], start=1):
            console.print(said(f"\n{phase['phase']}, row {number}, trained text marked:", style="bold"))
            shown = Text()
            for stretch in sample:
                marked = stretch["trained"] and console.color_system is None
                text = f"[[{stretch['text']}]]" if marked else stretch["text"]
                shown.append(said(text, "black on green" if stretch["trained"] else ""))
            console.print(shown, soft_wrap=True)


def _about(seconds: float) -> str:
    """An estimate of time, of a second at least."""
    return remaining(max(1, seconds))
