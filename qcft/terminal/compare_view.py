"""Answers of several stages side by side: in columns where the terminal is wide, else one under the other."""

from __future__ import annotations

from rich.padding import Padding
from rich.table import Table

from qcft.report.comparison import LANGUAGE, Compared, about, answer_rows, summary_rows
from qcft.terminal.streams import said, stdout
from qcft.terminal.tables import print_lines, print_records

NARROW = 30  # characters of a column that can still be read


def print_comparison(found: Compared) -> None:
    """Each prompt with its answers, then each stage's answers in figures."""
    console = stdout()
    for number, prompt in enumerate(found["prompts"], start=1):
        held_out = f", held-out row of {prompt['held_out']}" if prompt["held_out"] else ""
        console.print(said(f"prompt {number} of {len(found['prompts'])}{held_out}", "dim"))
        console.print(said(prompt["prompt"], "bold"))
        answers = answer_rows(prompt)
        if console.width >= NARROW * len(answers):
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), expand=True)
            for title, note, _ in answers:
                table.add_column(said(f"{title}\n{note}", "cyan"), ratio=1, overflow="fold")
            table.add_row(*(said(text) for *_, text in answers))
            console.print()
            console.print(table)
        else:
            for title, note, text in answers:
                console.print(said(f"\n{title}: {note}", "cyan"))
                console.print(Padding(said(text), (0, 0, 0, 2), expand=False))
        console.print()
    print_records(summary_rows(found), right=("mean tokens", "ended by themselves", LANGUAGE))
    print_lines([about(found)], "dim")
