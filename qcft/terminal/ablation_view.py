"""What a person sees of an ablation: its plan, its arms while they run, their results.

In a terminal the arms are a table that is updated in place, above a line of the running arm's progress; elsewhere
lines.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table

from qcft.events import ArmChanged, Event, Note, Progress, StepBegun
from qcft.report.ablation import Outcome, Spread, count_against, epochs_in_words, in_words
from qcft.terminal.format import duration, size
from qcft.terminal.progress import Reporter
from qcft.terminal.streams import stderr, stdout
from qcft.terminal.tables import grid, print_lines, print_records, say
from qcft.words import counted

if TYPE_CHECKING:
    from qcft.ablation.dry_run import AblationPlan, ArmListed, PlannedRun, Sums

STYLES = {"running": "bold", "failed": "yellow", "to do": "dim", "done": ""}
PLAN_NOTE = (
    "new: not shared with a run above. Times are estimates from finished steps of the same kind, else from model size."
)
SHOWN = 0.2  # seconds between two updates


@dataclass
class _Line:
    state: str = "to do"
    what: str = ""
    begun: float = field(default_factory=time.monotonic)
    seconds: float | None = None


class ArmsReporter(Reporter):
    """A listener that shows arms; the running arm's step is a cell of the table, its progress the line below."""

    def __init__(self, quiet: bool = False) -> None:
        super().__init__(quiet)
        self.lines: dict[str, _Line] = {}
        self.running: str | None = None
        self.live: Live | None = None

    def close(self) -> None:
        """Show the table for the last time."""
        super().close()
        if self.live is not None:
            self.live.update(self.shown(), refresh=True)
            self.live.stop()

    def __call__(self, event: Event) -> None:
        """Show one event."""
        if isinstance(event, ArmChanged):
            self._arm(event)
        elif self.live is None or (isinstance(event, Note) and event.level == "warning"):
            if not (isinstance(event, StepBegun) and event.state == "reused"):  # by nearly every arm
                super().__call__(event)
        elif self.running and isinstance(event, (StepBegun, Progress)):
            self._step(self.lines[self.running], event)
            self.live.update(self.shown())

    def _arm(self, event: ArmChanged) -> None:
        self._clear()
        line = self.lines.setdefault(event.run, _Line())
        if event.state == "running" and line.state != "running":
            line.begun, self.running = time.monotonic(), event.run
        elif line.state == "running":
            line.seconds = time.monotonic() - line.begun
        line.state, line.what = event.state, event.summary
        if self.quiet or event.state == "to do":
            return
        if self.console.is_terminal:
            if self.live is None:
                self.live = Live(console=self.console, refresh_per_second=1 / SHOWN)
                self.live.start()
            self.live.update(self.shown())
            return
        took = f" in {duration(line.seconds)}" if line.seconds is not None and event.state != "running" else ""
        text = f"arm {event.position}/{event.total} {event.run}: {event.state}{took}"
        text += f": {event.summary}" if event.summary else ""
        self.console.print_text(text, STYLES[event.state])

    def _step(self, line: _Line, event: StepBegun | Progress) -> None:
        if isinstance(event, Progress):
            self._follow(event, time.monotonic())
        else:
            line.what = f"{event.position}/{event.total} {event.title}"
            self._bar = None

    def shown(self) -> RenderableType:
        """The table, and the line of progress under it."""
        return Group(self.table(), self._bar) if self._bar is not None else self.table()

    def table(self) -> Table:
        """The arms with their current states."""
        rows, titles = [], ("arm", "state", "time")
        for run, line in self._window():
            seconds = time.monotonic() - line.begun if line.state == "running" else line.seconds
            rows.append((run, line.state, "" if seconds is None else duration(seconds), line.what))
        styles = [STYLES[state] for _, state, *_ in rows]
        return grid((*titles, ""), rows, ("time",), styles, no_wrap=titles)

    def _window(self) -> list[tuple[str, _Line]]:
        """The lines that the terminal has room for: around the running one."""
        lines, room = list(self.lines.items()), max(3, self.console.height - 4)
        at = list(self.lines).index(self.running) if self.running else 0
        first = max(0, min(at - room // 2, len(lines) - room))
        return lines[first : first + room]


def report_crash(text: str) -> None:
    """Print a line about an arm whose process crashed, which may have left the cursor hidden."""
    console = stderr()
    console.show_cursor()
    console.print_text(text)


def print_plan(plan: AblationPlan) -> None:
    """What an ablation would run: its runs, and what each needs beyond the runs before it."""
    rows = [
        {
            "run": run["run"],
            **(
                dict.fromkeys(("steps", "new", "done", "time left", "disk"), "?")
                if run["run"] in plan["missing"]
                else {
                    "steps": str(run["steps"]),
                    "new": str(run["own"]),
                    "done": str(run["done"]),
                    "time left": _cost(run),
                    "disk": _size(run),
                }
            ),
        }
        for run in plan["runs"]
    ]
    print_records(rows)
    _print_lengths(plan["runs"])
    total = plan["total"]
    known = " of the runs that can be planned" if plan["missing"] else ""
    stdout().print(
        f"{counted(total['steps'], 'step')}{known}, {total['shared']} of them shared; {total['done']} done; "
        f"time left {_cost(total)}, disk {_size(total)}"
    )
    print_lines([PLAN_NOTE], "dim")
    for text in dict.fromkeys(plan["missing"].values()):
        say(f"missing: {text}", "yellow")


def print_arms(arms: Sequence[ArmListed]) -> None:
    """The arms of a recipe, their seeds, and what each sets."""
    print_records(
        [
            {
                "arm": arm["arm"],
                "seeds": ", ".join(map(str, arm["seeds"])),
                "sets": ", ".join(f"{key}={json.dumps(value)}" for key, value in arm["set"].items())
                + (" (mixed: the data of all phases in one)" if arm["mixed"] else ""),
            }
            for arm in arms
        ]
    )


def _print_lengths(runs: list[PlannedRun]) -> None:
    """How long each run trains, compared with the first one, and its amount of replay."""
    rows = []
    known_runs = [(run["run"], training) for run in runs if (training := run["training"])]
    for name, training in known_runs:
        first = known_runs[0][1]
        known = training["replay_answer_tokens"]
        tokens, of_first = training["answer_tokens"] + (known or 0), first["answer_tokens"]
        of_first += first["replay_answer_tokens"] or 0
        rows.append(
            {
                "run": name,
                "training steps": ("about " if training["replay"] else "")  # its rows' lengths decide how packs fill
                + count_against(training["steps"], first["steps"], training is first),
                "answer tokens": count_against(tokens, of_first, training is first)
                + (" + generated replay" if known is None else ""),
                "epochs": epochs_in_words(training["epochs"]),
                "replay": "; ".join(one["in_words"].removeprefix("replay ") for one in training["replay"].values()),
            }
        )
    if rows:
        stdout().print()
        print_records(rows)
        print_lines(["answer tokens: those with loss; in brackets compared with the first run"], "dim")
        stdout().print()


def print_outcome(outcome: Outcome) -> None:
    """The arms side by side, their training's length with them; those that failed on stderr."""
    rows, arms = [], outcome["arms"]
    title = "\n[least, most of the seeds]" if any(arm["done"] > 1 for arm in arms) else ""
    first = next((arm for arm in arms if arm["done"]), None)
    untrained = any(arm["english_untrained"] for arm in arms)
    for arm in arms:
        rows.append(
            {
                "arm": arm["arm"],
                "seeds done": f"{arm['done']} of {arm['seeds']}",
                f"English{title}": _nats(arm["english"]),
                **({f"English, untrained{title}": _nats(arm["english_untrained"])} if untrained else {}),
                f"other languages{title}": _nats(arm["others"]),
                "training steps": _against(arm["steps"], first and first["steps"]),
                "answer tokens": _against(arm["answer_tokens"], first and first["answer_tokens"]),
                "epochs": epochs_in_words(arm["epochs"]) or "-",
                "time of all steps": "-" if arm["seconds"] is None else duration(arm["seconds"]["mean"]),
            }
        )
    print_records(rows)
    note = (
        "English, other languages: NLL since the base in nats per answer token of all rows (lower is better), mean of"
    )
    lines = [f"{note} the seeds; `qcft report {outcome['ablation']}` shows which arms differ clearly"]
    if untrained:
        lines.append("English, untrained: rows of a kind that no arm trains on")
    if first and len(arms) > 1:
        lines.append(f"training steps, answer tokens (those with loss): in brackets compared with {first['arm']}")
    print_lines(lines, "dim")
    for run in outcome["runs"]:
        if run["state"] == "failed" and run["error"]:
            say(f"{run['run']} failed: {in_words(run['error'])}", "yellow")


def _against(figure: Spread | None, first: Spread | None) -> str:
    """A mean count, and its difference from the first arm's."""
    if figure is None or first is None:
        return "-"
    return count_against(figure["mean"], first["mean"], figure is first)


def _cost(part: Sums) -> str:
    if part["seconds"] is None:
        return "unknown"
    more = f" + {part['unknown']} step{'s' * (part['unknown'] > 1)} unknown" if part["unknown"] else ""
    return duration(part["seconds"]) + more


def _size(part: Sums) -> str:
    return "unknown" if part["unknown"] and not part["bytes"] else size(part["bytes"])


def _nats(figure: Spread | None) -> str:
    if figure is None:
        return "-"
    spread = f" [{figure['least']:+.3f}, {figure['most']:+.3f}]" if figure["least"] < figure["most"] else ""
    return f"{figure['mean']:+.3f}{spread}"
