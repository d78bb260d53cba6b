"""Tables and lines. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, TypeVar

from rich.table import Table
from rich.text import Text

from qcft.events import Mixed
from qcft.report.arms import grouped
from qcft.report.cells import (
    change_rows,
    conclusion,
    continual_in_words,
    cut_in_words,
    noise_ratio,
    reasons_in_words,
    stage_rows,
    text_note,
)
from qcft.report.cost import RunCost
from qcft.report.task_cells import (
    FIDELITY,
    INTERVALS,
    SCORES,
    change_row,
    fidelity_rows,
    score_row,
    sides_of,
    way_of_asking,
)
from qcft.safe import json_shown, shown
from qcft.store.metrics import LossTerms
from qcft.store.table import Abilities, RunTable, TaskOf, TasksTable
from qcft.terminal.format import duration
from qcft.terminal.streams import said, stderr, stdout
from qcft.training.reference import terms_in_words
from qcft.words import counted

if TYPE_CHECKING:
    from qcft.inspect.layers import LayersTable
    from qcft.replay.rows import ReplayShown

Thing = TypeVar("Thing")
NOTE = f"{SCORES} {INTERVALS}"


def grid(
    titles: Sequence[str],
    rows: Iterable[Iterable[str]],
    right: Container[str] = (),
    styles: Iterable[str] = (),
    title: str | None = None,
    no_wrap: Container[str] = (),
) -> Table:
    """A plain table: the columns named in `right` are set right; `styles`: of the first rows, others have none."""
    heading = None if title is None else said(title)
    table = Table(title=heading, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in titles:
        table.add_column(said(name), justify="right" if name in right else "left", no_wrap=name in no_wrap)
    for row, style in zip(rows, chain(styles, repeat("")), strict=False):
        table.add_row(*(said(cell, style) for cell in row))
    return table


def mix_table(mixed: Mixed) -> Table:
    """Sources, rows, tokens and shares of what a phase trains on; answer tokens are those with loss."""
    rows, answers = (sum(getattr(s, key) for s in mixed.shares) for key in ("rows", "answer_tokens"))
    frozen = "" if mixed.frozen == "none" else f", frozen {mixed.frozen}"
    terms = f", {mixed.terms}" if mixed.terms else ""
    title = (
        f"{mixed.phase}: {counted(mixed.steps, 'step')} of about "
        f"{counted(round(mixed.rows_per_step), 'row')}{frozen}{terms}"
    )
    cells = [
        (
            *(s.source, f"{s.rows:,}", f"{s.rows / rows:.1%}", f"{s.answer_tokens:,}"),
            *(f"{s.answer_tokens / answers:.1%}", f"{s.tokens:,}", reasons_in_words(s.left_out, "-")),
        )
        for s in mixed.shares
    ]
    numbers = ("rows", "share", "answer tokens", "share", "tokens")
    return grid(("source", *numbers, "dropped"), cells, right=numbers, title=title)


def print_table(table: RunTable) -> None:
    """The table of stages x languages, the change since phase 1, and the conclusion."""
    if not table["stages"]:
        stdout().print("nothing has been measured yet")
        return
    _print_blocks([*stage_rows(table), *change_rows(table)], len(table["stages"]))
    stdout().print(
        "NLL in nats per answer token (lower is better), share of answer tokens right; * English; "
        "! an English loss whose interval excludes zero; each interval by itself, over rows",
        style="dim",
    )
    print_lines(filter(None, [text_note(table)]), "dim")
    print_lines(conclusion(table))
    print_lines(continual_in_words(table["continual"], "nats over the phases' own held-out rows"))
    print_abilities(table["abilities"])


def print_terms(terms: Mapping[str, LossTerms]) -> None:
    """The values of the terms of each phase's loss, for phases that have some."""
    print_lines(
        f"{name}, terms of the training loss in nats per answer token: {terms_in_words(one)}"
        for name, one in terms.items()
    )


def print_abilities(abilities: Abilities) -> None:
    """What the stages were evaluated on: scores, averages and changes; the language of answers."""
    for table in abilities["tables"]:
        titles, sides = {task["task"]: _task_title(task) for task in table["tasks"]}, sides_of([table])
        scores = [score_row(stage, titles, sides) for stage in table["stages"]]
        _print_blocks([*scores, *(change_row(change, titles, sides) for change in table["changes"])], len(scores))
        print_lines([f"{_settings(table)}. {NOTE}"], "dim")
        print_lines(continual_in_words(table["continual"], "points", 100))
    answers = grouped(abilities["fidelity"], way_of_asking)
    for cells in answers:
        _print_blocks(fidelity_rows(cells), len(cells))
    if answers:
        print_lines([FIDELITY], "dim")
    if max(len(abilities["tables"]), len(answers)) > 1:
        stdout().print("Different tables were measured with different settings: do not compare their numbers.")
    print_lines(f"answers for AlpacaEval's judge, {cell['name']}: {cell['file']}" for cell in abilities["alpaca_eval"])


def _task_title(task: TaskOf) -> str:
    shots = f", {counted(task['shots'], 'shot')}" if task["shots"] else ""
    return f"{task['task']}\n{task['metric']}, {counted(task['items'], 'item')}{shots}"


def _settings(table: TasksTable) -> str:
    """How the scores of a table were made."""
    words = [f"lm-eval {table['settings']['lm_eval']}", "chat template applied"]
    for task in table["tasks"]:
        cuts = [f"limit {task['limit']}"] if task["limit"] else []
        cuts += [f"answers of at most {task['max_new_tokens']} tokens"] if task["max_new_tokens"] else []
        words += [f"{task['task']} {', '.join(cuts)}"] if cuts else []
    return "; ".join(words)


def _print_blocks(found: Sequence[Mapping[str, str]], plain: int) -> None:
    """A table, in blocks of columns that fit side by side; rows after the first `plain` are bold."""
    console, titles, rows = stdout(), list(found[0]), [list(row.values()) for row in found]
    styles = [""] * plain + ["bold"] * (len(rows) - plain)
    console.print()
    for columns in columns_that_fit(titles, rows, console.width):
        names = [titles[i] for i in columns]
        console.print(grid(names, ([row[i] for i in columns] for row in rows), names[1:], styles, no_wrap=names))
        console.print()


def print_cost(cost: RunCost) -> None:
    """The cost of a run's finished steps, in one line."""
    tokens = f", {cost['tokens']:,} tokens trained or generated" if cost["tokens"] else ""
    text = (
        f"{counted(cost['steps'], 'step')} done in {duration(cost['seconds'])}{tokens}; "
        f"peak memory {cost['peak_bytes'] / 2**30:.2f} GiB; {cost['disk_bytes'] / 1e6:,.0f} MB on disk."
    )
    print_lines([text])


def print_answer(question: str, answer: str) -> None:
    """A report's question and answer, beside its path."""
    say(question, "dim")
    say(answer)


def print_replay(shown: ReplayShown) -> None:
    """A replay set: its parts, what was dropped, and samples of it."""
    console = stdout()
    rows = [
        {
            "kind": part["kind"],
            "rows": f"{part['rows']:,}" + (f" ({part['repeated']:,} repeated)" if part["repeated"] else ""),
            "answer tokens": f"{part['answer_tokens']:,}",
            "drawn from": f"{part['pool']:,}: {part['reason']}",
            "dropped": reasons_in_words(part["left_out"], "-"),
        }
        for part in shown["parts"]
    ]
    print_records(rows, right=("rows", "answer tokens"))
    console.print(
        f"{shown['share_of_rows']:.1%} of the mix's rows, {shown['share_of_answer_tokens']:.1%} of its answer tokens"
    )
    print_lines(line for part in shown["parts"] if (line := cut_in_words(part)))
    for cost in (part["generation"] for part in shown["parts"] if part["generation"]):
        console.print(
            f"generated {counted(cost['answers'], 'answer')}, {counted(cost['tokens'], 'token')} in "
            f"{duration(cost['seconds'])}: "
            f"{cost['tokens_per_second']:,.0f} tokens/s in batches of at most {cost['batch']}"
        )
    for sample in shown["samples"]:
        reason = f", dropped: {sample['reason']}" if "reason" in sample else ""
        console.print(said(f"\n{sample['provenance']['kind']}{reason}", style="bold"))
        print_lines(f"{turn['role']}: {turn['content']}" for turn in (*sample["prompt"], *sample["completion"]))
    print_lines([f"\n{shown['file']}"], "dim")


def columns_that_fit(titles: list[str], rows: list[list[str]], width: int) -> list[list[int]]:
    """Columns that fit side by side, block by block; each block starts with the stages."""
    lines = [[line for cell in column for line in cell.splitlines()] for column in zip(titles, *rows, strict=True)]
    widths = [max(map(len, column)) + 2 for column in lines]
    blocks = [[0]]
    for i in range(1, len(titles)):
        if len(blocks[-1]) > 1 and sum(widths[j] for j in blocks[-1]) + widths[i] > width:
            blocks.append([0])
        blocks[-1].append(i)
    return blocks


def print_layers(table: LayersTable) -> None:
    """The layers of a phase: which have adapters, what phase 1 changed, signal to noise."""
    per_layer = max(len(layer["modules"]) for layer in table["layers"])
    rows = []
    for layer in table["layers"]:
        on = ", ".join(_last(layer["adapted"])) or "frozen"
        if len(layer["adapted"]) >= per_layer:
            on = f"all {per_layer} linear modules"
        measured = ("-" if layer["change"] is None else f"{layer['change']:.3g}", noise_ratio(layer["snr"]))
        rows.append((str(layer["layer"]), on, f"{layer['trainable_parameters']:,}", *measured))
    styles = ["" if layer["adapted"] else "dim" for layer in table["layers"]]
    titles = ("layer", "adapters on", "trainable", "changed by phase 1", "signal/noise")
    stdout().print(grid(titles, rows, {*titles} - {"adapters on"}, styles))
    share = table["trainable_parameters"] / table["parameters"]
    print_lines(
        [
            f"{table['phase']} with freeze {table['freeze']}: adapters of rank {table['rank']} on "
            f"{table['adapted_modules']} of {table['linear_modules']} linear modules, "
            f"{table['trainable_parameters']:,} trainable parameters ({share:.2%} of {table['parameters']:,}); "
            f"the backward pass stops at layer {table['frozen_below']}. Of the weights without "
            f"embeddings and head, {table['adapted_share']:.0%} have adapters and {table['quantised_share']:.0%} are "
            "in 4 bits"
        ]
    )
    print_lines(
        [
            f"Measured on {table['weights']}. Changed: sum of squared Frobenius norms of the deltas; signal/noise: "
            "mean of the layer's modules."
        ],
        "dim",
    )


def _last(modules: list[str]) -> list[str]:
    """The last parts of modules' names, where these differ."""
    short = [module.rsplit(".", 1)[-1] for module in modules]
    return short if len(set(short)) == len(short) else modules


def print_rows(titles: list[str], rows: Iterable[Iterable[str]]) -> None:
    """A plain table on stdout."""
    stdout().print(grid(titles, rows))


def print_records(rows: Sequence[Mapping[str, str]], right: Container[str] = ()) -> None:
    """Rows that map titles to cells, as a plain table on stdout."""
    stdout().print(grid([*rows[0]] if rows else [], [row.values() for row in rows], right))


def print_fitting(rows: Sequence[Mapping[str, str]], right: Container[str] = ()) -> None:
    """Rows as a plain table of the first columns that fit completely; all columns where stdout is not a terminal."""
    console, titles = stdout(), [*rows[0]]
    widths = [max(said(cell).cell_len for cell in (title, *(row[title] for row in rows))) for title in titles]
    while console.is_terminal and len(titles) > 1 and sum(widths) + 2 * len(widths) - 2 > console.width:
        titles.pop()
        widths.pop()
    table = grid(titles, ([row[title] for title in titles] for row in rows), right, no_wrap=titles)
    console.print(table, soft_wrap=not console.is_terminal)


def say(text: str, style: str = "") -> None:
    """A line beside the data, on stderr."""
    stderr().print_text(text, style)


def next_step(text: str, quiet: bool = False) -> None:
    """A suggested next command, on stderr."""
    if not quiet:
        say(f"next: {text}", "dim")


def print_lines(lines: Iterable[str], style: str = "") -> None:
    """Sentences on stdout, each on a line of its own."""
    for line in lines:
        stdout().print_text(line, style)


def show(document: Thing, json_: bool, printed: Callable[[Thing], None]) -> None:
    """Print a document for scripts, or as `printed` does."""
    print_json(document) if json_ else printed(document)


def print_json(document: Any) -> None:
    """A document for scripts, on stdout."""
    text = json.dumps(document, indent=2, ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf"))
    sys.stdout.write(f"{json_shown(text)}\n")


def print_error(message: str, hint: str) -> None:
    """One line that says what is wrong, one that says what to do."""
    console = stderr()
    wrapped = not console.is_terminal
    console.print(Text.assemble(("error: ", "bold red"), _one_line(message)), soft_wrap=wrapped)
    if hint:
        console.print(Text.assemble(("hint: ", "bold"), _one_line(hint)), soft_wrap=wrapped)


def _one_line(text: str) -> str:
    return shown(" ".join(text.split()))
