"""Tables and lines. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qcft.events import Mixed
from qcft.report.cells import change_rows, conclusion, continual_in_words, header, stage_rows
from qcft.safe import json_shown, shown
from qcft.terminal.ability_tables import (
    FIDELITY_NOTE,
    NOTE,
    asked_alike,
    fidelity_table,
    settings_in_words,
    task_header,
    task_rows,
)
from qcft.terminal.format import duration
from qcft.terminal.streams import said, stderr, stdout


def mix_table(mixed: Mixed) -> Table:
    """Sources, rows, tokens and shares of what a phase trains on."""
    rows, tokens = (sum(getattr(s, key) for s in mixed.shares) for key in ("rows", "tokens"))
    frozen = "" if mixed.frozen == "none" else f", frozen {mixed.frozen}"
    title = f"{mixed.phase}: {mixed.steps} steps of about {mixed.rows_per_step:.0f} rows{frozen}"
    table = Table(title=said(title), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("source", "rows", "share", "tokens", "share", "answer tokens", "left out"):
        table.add_column(name, justify="left" if name in {"source", "left out"} else "right")
    for share in mixed.shares:
        left_out = ", ".join(f"{n} {reason}" for reason, n in share.left_out.items()) or "-"
        table.add_row(
            said(share.source),
            f"{share.rows:,}",
            f"{share.rows / rows:.1%}",
            f"{share.tokens:,}",
            f"{share.tokens / tokens:.1%}",
            f"{share.answer_tokens:,}",
            said(left_out),
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
        console.print(said(sentence), soft_wrap=True)
    for sentence in continual_in_words(table["continual"], "nats over the phases' own held-out rows"):
        console.print(said(sentence), soft_wrap=True)
    print_abilities(table["abilities"])


def print_abilities(abilities: Mapping[str, Any]) -> None:
    """What the stages were evaluated on: scores, averages and changes; the language of answers."""
    console = stdout()
    for table in abilities["tables"]:
        _print_blocks(console, task_header(table), task_rows(table), len(table["stages"]))
        console.print(said(f"{settings_in_words(table)}. {NOTE}", style="dim"), soft_wrap=True)
        for sentence in continual_in_words(table["continual"], "points", 100):
            console.print(said(sentence), soft_wrap=True)
    answers = asked_alike(abilities["fidelity"])
    for cells in answers:
        titles, rows = fidelity_table(cells)
        _print_blocks(console, titles, rows, len(rows))
    if answers:
        console.print(FIDELITY_NOTE, style="dim", soft_wrap=True)
    if max(len(abilities["tables"]), len(answers)) > 1:
        console.print("What stands in different tables was measured with other settings: do not compare it.")
    for cell in abilities["alpaca_eval"]:
        console.print(said(f"answers for AlpacaEval's judge, {cell['name']}: {cell['file']}"), soft_wrap=True)


def _print_blocks(console: Console, titles: list[str], rows: list[list[str]], plain: int) -> None:
    """A table, in blocks of columns that fit side by side; rows after the first `plain` are bold."""
    console.print()
    for columns in _blocks(titles, rows, console.width):
        shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for i in columns:
            shown.add_column(said(titles[i]), justify="right" if i else "left", no_wrap=True)
        for number, row in enumerate(rows):
            shown.add_row(*(said(row[i], style="bold" if number >= plain else "") for i in columns))
        console.print(shown)
        console.print()


def print_cost(cost: Mapping[str, float]) -> None:
    """What a run's done steps took, in one line."""
    tokens = f", {cost['tokens']:,} tokens trained or generated" if cost["tokens"] else ""
    text = (
        f"{cost['steps']} steps done in {duration(cost['seconds'])}{tokens}; "
        f"peak memory {cost['peak_bytes'] / 2**30:.2f} GiB; {cost['disk_bytes'] / 1e6:,.0f} MB on disk."
    )
    stdout().print(said(text), soft_wrap=True)


def print_answer(question: str, answer: str) -> None:
    """A report's question and answer, beside its path."""
    console = stderr()
    console.print(said(question, style="dim"), soft_wrap=True)
    console.print(said(answer), soft_wrap=True)


def print_replay(shown: Mapping[str, Any]) -> None:
    """A replay set: what it is made of, what was left out, and samples of it."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("kind", "rows", "answer tokens", "drawn from", "left out"):
        table.add_column(name, justify="right" if name in {"rows", "answer tokens"} else "left")
    for part in shown["parts"]:
        left_out = ", ".join(f"{n} {reason}" for reason, n in part["left_out"].items()) or "-"
        rows = f"{part['rows']:,}" + (f" ({part['repeated']:,} again)" if part["repeated"] else "")
        drawn = said(f"{part['pool']:,}: {part['reason']}")
        table.add_row(said(part["kind"]), rows, f"{part['answer_tokens']:,}", drawn, said(left_out))
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
        console.print(said(f"\n{sample['provenance']['kind']}{reason}", style="bold"))
        for turn in (*sample["prompt"], *sample["completion"]):
            console.print(said(f"{turn['role']}: {turn['content']}"), soft_wrap=True)
    console.print(said(f"\n{shown['file']}", style="dim"), soft_wrap=True)


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
        shown.add_row(*(said(cell, style="" if adapted else "dim") for cell in cells))
    console = stdout()
    console.print(shown)
    share = table["trainable_parameters"] / table["parameters"]
    console.print(
        said(
            f"{table['phase']} with freeze {table['freeze']}: adapters of rank {table['rank']} on "
            f"{table['adapted_modules']} of {table['linear_modules']} linear modules, "
            f"{table['trainable_parameters']:,} trainable parameters ({share:.2%} of {table['parameters']:,}); "
            f"the backward pass stops at layer {table['frozen_below']}. Of the weights without "
            f"embeddings and head, {table['adapted_share']:.0%} carry adapters and {table['quantised_share']:.0%} are "
            "held in 4 bits"
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
        table.add_column(said(title))
    for row in rows:
        table.add_row(*(said(cell) for cell in row))
    stdout().print(table)


def say(text: str, style: str = "") -> None:
    """A line beside the data, on stderr."""
    stderr().print(said(text, style), soft_wrap=True)


def print_lines(lines: Sequence[str]) -> None:
    """Sentences on stdout, each on a line of its own."""
    for line in lines:
        stdout().print(said(line), soft_wrap=True)


def print_json(document: Any) -> None:
    """A document for scripts, on stdout."""
    text = json.dumps(document, indent=2, ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf"))
    sys.stdout.write(f"{json_shown(text)}\n")


def print_error(message: str, hint: str) -> None:
    """One line that says what is wrong, one that says what to do."""
    console = stderr()
    console.print(Text.assemble(("error: ", "bold red"), _one_line(message)), soft_wrap=True)
    if hint:
        console.print(Text.assemble(("hint: ", "bold"), _one_line(hint)), soft_wrap=True)


def _one_line(text: str) -> str:
    return shown(" ".join(text.split()))
