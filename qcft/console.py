"""What a person sees: progress, the mix, tables. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from qcft.events import Event, Mixed, Note, Progress, StepBegun, StepEnded
from qcft.report.abilities import (
    FIDELITY_NOTE,
    NOTE,
    asked_alike,
    continual_in_words,
    fidelity_table,
    settings_in_words,
    task_header,
    task_rows,
)
from qcft.report.before import memory_table, step_rows
from qcft.report.cells import change_rows, conclusion, header, plain, stage_rows

WIDE = 130  # columns of a table that goes to a file or a pipe
QUIET_SECONDS = 20  # between progress lines where no bar can be drawn


def stdout() -> Console:
    """The console for data."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)


def stderr() -> Console:
    """The console for everything else."""
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else WIDE)


class Reporter:
    """Listens to the work and shows it: a line per step, one progress bar under them."""

    def __init__(self, quiet: bool = False) -> None:
        self.console = stderr()
        self.quiet = quiet
        self._bars: Bars | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._begun = 0.0
        self._first = 0.0
        self._said = 0.0

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, Progress):
            self._progress(event)
            return
        self._clear()
        if isinstance(event, Note):
            style = "yellow" if event.level == "warning" else "dim"
            prefix = "warning: " if event.level == "warning" else ""
            if not self.quiet or event.level == "warning":
                self.console.print(Text(f"{prefix}{plain(event.text)}", style=style), soft_wrap=True)
        elif self.quiet:
            return
        elif isinstance(event, StepBegun):
            how = {"new": "", "resumed": "  going on from where it stopped", "reused": "  done before, reused"}[
                event.state
            ]
            style = "dim" if event.state == "reused" else "bold"
            self.console.print(Text(f"[{event.position}/{event.total}] {event.title}{how}", style=style))
        elif isinstance(event, StepEnded):
            more = f": {event.summary}" if event.summary else ""
            self.console.print(Text(f"      {duration(event.seconds)}{more}", style="dim"), soft_wrap=True)
        elif isinstance(event, Mixed):
            self.console.print(mix_table(event))

    def close(self) -> None:
        """Take the bar off the screen."""
        self._clear()

    def _progress(self, event: Progress) -> None:
        if self.quiet:
            return
        now = time.monotonic()
        if event.label.split(" (")[0] != self._label:
            self._clear()
            self._label, self._begun, self._first = event.label.split(" (")[0], now, event.done
            self._said = now
        stats = "  ".join(f"{k} {v}" if k in {"loss", "peak"} else v for k, v in event.stats.items())
        text = f"{self._pace(event, now)}  {stats}".rstrip()
        if not self.console.is_terminal:
            if now - self._said > QUIET_SECONDS:
                self._said = now
                self.console.print(Text(f"      {event.label}: {_of(event)}  {text}", style="dim"), soft_wrap=True)
            return
        if self._bars is None:
            columns = (TextColumn("      {task.description}"), BarColumn(24), TextColumn("{task.fields[text]}"))
            self._bars = Bars(*columns, console=self.console, transient=True)
            self._bars.start()
            self._task = self._bars.add_task(event.label, total=event.total or None, text="")
        assert self._task is not None
        self._bars.update(
            self._task,
            description=event.label,
            completed=event.done,
            total=event.total or None,
            text=f"{_of(event)}  {text}",
        )

    def _pace(self, event: Progress, now: float) -> str:
        done, seconds = event.done - self._first, now - self._begun
        if done <= 0 or seconds < 0.5:
            return ""
        rate = done / seconds
        left = f"  {duration((event.total - event.done) / rate)} left" if event.total > event.done else ""
        return f"{rate:.1f} {event.unit}/s{left}" if rate >= 1 else f"{1 / rate:.1f} s each{left}"

    def _clear(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._task, self._label = None, None, ""


def mix_table(mixed: Mixed) -> Table:
    """Sources, rows, tokens and shares of what a phase trains on."""
    rows, tokens = (sum(getattr(s, key) for s in mixed.shares) for key in ("rows", "tokens"))
    frozen = "" if mixed.frozen == "none" else f", frozen {mixed.frozen}"
    title = f"{mixed.phase}: {mixed.steps} steps of about {mixed.rows_per_step:.0f} rows{frozen}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("source", "rows", "share", "tokens", "share", "answer tokens", "left out"):
        table.add_column(name, justify="left" if name in {"source", "left out"} else "right")
    for share in mixed.shares:
        left_out = ", ".join(f"{n} {reason}" for reason, n in share.left_out.items()) or "-"
        table.add_row(
            Text(share.source),
            f"{share.rows:,}",
            f"{share.rows / rows:.1%}",
            f"{share.tokens:,}",
            f"{share.tokens / tokens:.1%}",
            f"{share.answer_tokens:,}",
            Text(left_out),
        )
    return table


def print_table(table: Mapping[str, Any]) -> None:
    """The table of stages x languages, the change since phase 1, and what it says."""
    console = stdout()
    if not table["stages"]:
        console.print("nothing is measured yet")
        return
    _print_blocks(console, header(table), [*stage_rows(table), *change_rows(table)], len(table["stages"]))
    console.print(
        "NLL in nats per answer token (lower is better), share of answer tokens right; * English; "
        "! an English loss whose 95% interval excludes zero",
        style="dim",
    )
    for sentence in conclusion(table):
        console.print(Text(sentence), soft_wrap=True)
    for sentence in continual_in_words(table["continual"], "nats over the phases' own held-out rows"):
        console.print(Text(sentence), soft_wrap=True)
    print_abilities(table["abilities"])


def print_abilities(abilities: Mapping[str, Any]) -> None:
    """What the stages were evaluated on: scores, averages and changes; the language of answers."""
    console = stdout()
    for table in abilities["tables"]:
        _print_blocks(console, task_header(table), task_rows(table), len(table["stages"]))
        console.print(Text(f"{settings_in_words(table)}. {NOTE}", style="dim"), soft_wrap=True)
        for sentence in continual_in_words(table["continual"], "points", 100):
            console.print(Text(sentence), soft_wrap=True)
    answers = asked_alike(abilities["fidelity"])
    for cells in answers:
        titles, rows = fidelity_table(cells)
        _print_blocks(console, titles, rows, len(rows))
    if answers:
        console.print(FIDELITY_NOTE, style="dim", soft_wrap=True)
    if max(len(abilities["tables"]), len(answers)) > 1:
        console.print("What stands in different tables was measured with other settings: do not compare it.")
    for cell in abilities["alpaca_eval"]:
        console.print(Text(f"answers for AlpacaEval's judge, {cell['name']}: {cell['file']}"), soft_wrap=True)


def _print_blocks(console: Console, titles: list[str], rows: list[list[str]], plain: int) -> None:
    """A table, in blocks of columns that fit side by side; rows after the first `plain` are bold."""
    console.print()
    for columns in _blocks(titles, rows, console.width):
        shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for i in columns:
            shown.add_column(Text(titles[i]), justify="right" if i else "left", no_wrap=True)
        for number, row in enumerate(rows):
            shown.add_row(*(Text(row[i], style="bold" if number >= plain else "") for i in columns))
        console.print(shown)
        console.print()


def print_cost(cost: Mapping[str, float]) -> None:
    """What a run's done steps took, in one line."""
    tokens = f", {cost['tokens']:,} tokens trained or generated" if cost["tokens"] else ""
    text = (
        f"{cost['steps']} steps done in {duration(cost['seconds'])}{tokens}; "
        f"peak memory {cost['peak_bytes'] / 2**30:.2f} GiB; {cost['disk_bytes'] / 1e6:,.0f} MB on disk."
    )
    stdout().print(Text(text), soft_wrap=True)


def print_answer(question: str, answer: str) -> None:
    """A report's question and answer, beside its path."""
    console = stderr()
    console.print(Text(question, style="dim"), soft_wrap=True)
    console.print(Text(answer), soft_wrap=True)


def print_replay(shown: Mapping[str, Any]) -> None:
    """A replay set: what it is made of, what was left out, and samples of it."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("kind", "rows", "answer tokens", "drawn from", "left out"):
        table.add_column(name, justify="right" if name in {"rows", "answer tokens"} else "left")
    for part in shown["parts"]:
        left_out = ", ".join(f"{n} {reason}" for reason, n in part["left_out"].items()) or "-"
        rows = f"{part['rows']:,}" + (f" ({part['repeated']:,} again)" if part["repeated"] else "")
        drawn = Text(f"{part['pool']:,}: {part['reason']}")
        table.add_row(part["kind"], rows, f"{part['answer_tokens']:,}", drawn, Text(left_out))
    console = stdout()
    console.print(table)
    console.print(
        f"{shown['share_of_rows']:.1%} of the mix's rows, {shown['share_of_answer_tokens']:.1%} of its answer tokens"
    )
    for part in shown["parts"]:
        cost = part["generation"]
        if cost:
            console.print(
                f"generated {cost['answers']:,} answers, {cost['tokens']:,} tokens in {duration(cost['seconds'])}: "
                f"{cost['tokens_per_second']:,.0f} tokens/s in batches of at most {cost['batch']}"
            )
    for sample in shown["samples"]:
        reason = f", left out: {sample['reason']}" if "reason" in sample else ""
        console.print(Text(f"\n{sample['provenance']['kind']}{reason}", style="bold"))
        for turn in (*sample["prompt"], *sample["completion"]):
            console.print(Text(f"{turn['role']}: {plain(turn['content'])}"), soft_wrap=True)
    console.print(Text(f"\n{shown['file']}", style="dim"), soft_wrap=True)


def _blocks(titles: list[str], rows: list[list[str]], width: int) -> list[list[int]]:
    """Columns that fit side by side, block by block; each block begins with the stages."""
    lines = [[line for cell in column for line in cell.splitlines()] for column in zip(titles, *rows, strict=True)]
    widths = [max(map(len, column)) + 2 for column in lines]
    blocks = [[0]]
    for i in range(1, len(titles)):
        if len(blocks[-1]) > 1 and sum(widths[j] for j in blocks[-1]) + widths[i] > width:
            blocks.append([0])
        blocks[-1].append(i)
    return blocks


def print_layers(table: Mapping[str, Any]) -> None:
    """The layers of a phase: what carries adapters, what phase 1 changed, signal to noise."""
    per_layer = max(len(layer["modules"]) for layer in table["layers"])
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("layer", "adapters on", "trainable", "changed by phase 1", "signal/noise"):
        shown.add_column(title, justify="left" if title == "adapters on" else "right")
    for layer in table["layers"]:
        adapted = layer["adapted"]
        on = ", ".join(_last(adapted)) if len(adapted) < per_layer else f"all {per_layer} linear modules"
        cells = [
            str(layer["layer"]),
            on or "frozen",
            f"{layer['trainable_parameters']:,}",
            *("-" if layer[key] is None else f"{layer[key]:.3g}" for key in ("change", "snr")),
        ]
        shown.add_row(*(Text(cell, style="" if adapted else "dim") for cell in cells))
    console = stdout()
    console.print(shown)
    share = table["trainable_parameters"] / table["parameters"]
    console.print(
        Text(
            f"{table['phase']} with freeze {table['freeze']}: adapters of rank {table['rank']} on "
            f"{table['adapted_modules']} of {table['linear_modules']} linear modules, "
            f"{table['trainable_parameters']:,} trainable parameters ({share:.2%} of {table['parameters']:,}); "
            f"the backward pass stops at layer {table['frozen_below']}"
        ),
        soft_wrap=True,
    )
    console.print(
        f"Measured on {table['weights']}. Changed: sum of squared Frobenius norms of the deltas; signal/noise: mean of "
        "the layer's modules.",
        style="dim",
        soft_wrap=True,
    )


def _last(modules: list[str]) -> list[str]:
    """The last parts of modules' names, where that tells them apart."""
    short = [module.rsplit(".", 1)[-1] for module in modules]
    return short if len(set(short)) == len(short) else modules


def print_rows(titles: list[str], rows: list[list[str]]) -> None:
    """A plain table on stdout."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in titles:
        table.add_column(title)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    stdout().print(table)


def say(text: str) -> None:
    """A line beside the data, on stderr."""
    stderr().print(Text(text), soft_wrap=True)


def print_lines(lines: Sequence[str]) -> None:
    """Sentences on stdout, each on a line of its own."""
    for line in lines:
        stdout().print(Text(line), soft_wrap=True)


def print_check(found: Mapping[str, Any], lines: list[str]) -> None:
    """What a recipe would take, and rows with what is trained on marked: by colour, else by brackets."""
    console = stdout()
    print_rows(["step", "state", "training", "memory", "writes"], step_rows(found))
    console.print()
    print_rows(*memory_table(found))
    console.print()
    for line in lines:
        console.print(Text(line, style="bold red" if "DOES NOT FIT" in line else ""), soft_wrap=True)
    for phase in found["phases"]:
        for number, sample in enumerate(phase["samples"], start=1):
            console.print(Text(f"\n{phase['phase']}, row {number}, what is trained on marked:", style="bold"))
            shown = Text()
            for stretch in sample:
                marked = stretch["trained"] and console.color_system is None
                text = f"[[{stretch['text']}]]" if marked else stretch["text"]
                shown.append(text, style="black on green" if stretch["trained"] else "")
            console.print(shown, soft_wrap=True)


def print_json(document: Any) -> None:
    """A document for scripts, on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def print_error(message: str, hint: str) -> None:
    """One line that says what is wrong, one that says what to do."""
    console = stderr()
    console.print(Text.assemble(("error: ", "bold red"), _one_line(message)), soft_wrap=True)
    if hint:
        console.print(Text.assemble(("hint: ", "bold"), _one_line(hint)), soft_wrap=True)


def duration(seconds: float) -> str:
    """`41 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """`340 kB`, `1.2 GB`; thousands, as disks are sold."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count:.0f} bytes"


def _of(event: Progress) -> str:
    return f"{event.done:,.0f}/{event.total:,.0f} {event.unit}" if event.total else f"{event.done:,.0f} {event.unit}"


def _one_line(text: str) -> str:
    return plain(" ".join(text.split()))
