"""The line of progress: what it shows first, and that nothing of it is cut in a terminal of any usual width."""

import io
import re
import sys

import pytest
from rich.console import Console

from qcft.events import ArmChanged, Progress, StepBegun
from qcft.terminal.ablation_view import ArmsReporter
from qcft.terminal.format import remaining
from qcft.terminal.progress import Bar, Reporter
from qcft.terminal.streams import CleanConsole

STATS = {"loss": "5.346", "speed": "1,234 tokens/s", "peak": "11.1 GiB cuda", "English": "English NLL 2.816 (+0.3%)"}


def event(done, stats=STATS, total=1250):
    return Progress("training phase2", done, total, "steps", stats)


def painted(thing, width):
    """What a terminal with colours shows: without them the part of a bar that is to come is blank."""
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard")
    console.print(thing)
    return re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()).rstrip("\n")


@pytest.fixture
def bar():
    """One whose work has been going for a while."""
    made = Bar(event(10), 0.0)
    made.update(event(312), 77.0)
    return made


@pytest.mark.parametrize("width", [80, 120])
def test_english_is_seen_at_usual_widths_and_nothing_is_cut(bar, width):
    line = painted(bar, width)
    assert "\n" not in line
    assert len(line.rstrip()) <= width
    assert "…" not in line
    parts = re.split(r" {2,}", line.strip())
    drawn = next(i for i, part in enumerate(parts) if re.fullmatch("[━╸╺ ]+", part))
    assert len(parts[drawn]) >= 8
    wanted = ["312/1,250 steps", "4 min left", "English NLL 2.816 (+0.3%)", "loss 5.346"]
    assert parts[drawn + 1 : drawn + 5] == wanted
    assert ("training phase2" in line) == (width == 120)


@pytest.mark.parametrize("width", range(30, 200, 7))
def test_a_part_is_shown_completely_or_not_at_all(bar, width):
    line = painted(bar, width)
    assert "\n" not in line
    known = {"training phase2", "312/1,250 steps", "4 min left", "3.9 steps/s", "loss 5.346", "peak 11.1 GiB cuda"}
    parts = [part for part in re.split(r" {2,}", line.strip()) if not re.fullmatch("[━╸╺ ]+", part)]
    assert set(parts) <= known | {STATS["English"], STATS["speed"]}
    assert parts  # at least how far it is


def test_work_of_unknown_length_and_without_figures():
    made = Bar(Progress("reading data.jsonl", 12_000, 0, "rows"), 0.0)
    assert re.search(r"reading data.jsonl +━+ +12,000 rows", painted(made, 80))
    assert made.in_words() == "reading data.jsonl: 12,000 rows"


def test_a_line_where_no_bar_can_be_drawn_has_all_in_the_same_order(bar):
    assert bar.in_words() == (
        "training phase2: 312/1,250 steps  4 min left  English NLL 2.816 (+0.3%)  loss 5.346  3.9 steps/s  "
        "1,234 tokens/s  peak 11.1 GiB cuda"
    )


@pytest.mark.parametrize("width", [80, 120])
def test_the_view_of_an_ablation_shows_english_too(width, monkeypatch):
    view = ArmsReporter()
    view.console = Console(file=io.StringIO(), width=width, height=30, force_terminal=True)
    name = "add-spanish-freeze-gr20-s0"
    for one in (
        *(ArmChanged(f"{name[:-1]}{i}", "gr20", i, i + 1, 3, "to do") for i in range(3)),
        ArmChanged(name, "gr20", 0, 1, 3, "running"),
        StepBegun("train-1", "train phase2", 9, 10, "new"),
        event(312),
    ):
        view(one)
    shown = painted(view.shown(), width)
    view.close()
    assert re.search(r"━{3}.*English NLL 2\.816 \(\+0\.3%\)", shown.splitlines()[-1])
    assert "9/10 train phase2" in shown
    assert "…" not in shown
    assert painted(view.shown(), width).splitlines()[-1].startswith(f"{name[:-1]}2")  # the line goes when it ends


@pytest.mark.parametrize(
    ("seconds", "says"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3500, "58 min"), (7500, "2 h 5 min")]
)
def test_time_left_is_not_more_exact_than_it_is_known(seconds, says):
    assert remaining(seconds) == says


def reused(position, total=10, title="train phase2"):
    return StepBegun("train-1", title, position, total, "reused")


@pytest.mark.parametrize("terminal", [True, False])
def test_steps_that_are_reused_are_one_line(terminal, capsys):
    reporter = Reporter()
    reporter.console = CleanConsole(sys.stderr)
    reporter.console._force_terminal = terminal
    for position in range(1, 10):
        reporter(reused(position))
    reporter(StepBegun("probe-1", "measure phase2", 10, 10, "resumed"))
    reporter(reused(1, 1))
    reporter.close()
    reporter.close()
    shown = capsys.readouterr().err
    assert re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines() == [
        "9 steps reused",
        "[10/10] measure phase2, resumed",
        "1 step reused",
    ]


def test_a_text_is_wrapped_by_word_on_a_terminal_and_one_line_elsewhere():
    text = "the lowest layers are frozen: their output is computed once per row"
    shown = []
    for terminal in (True, False):
        stream = io.StringIO()
        console = CleanConsole(stream)
        console._force_terminal, console.width = terminal, 30
        console.print_text(text, indent=6)
        shown.append(stream.getvalue())
    lines = [line.rstrip() for line in shown[0].splitlines()]
    assert len(lines) > 2
    assert all(len(line) <= 30 and line.startswith("      ") for line in lines)
    assert " ".join(line.strip() for line in lines) == text
    assert shown[1] == f"      {text}\n"
