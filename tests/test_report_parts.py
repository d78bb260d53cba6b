"""Parts of the report on their own: the answer's words, the looks of plots, text that is no text."""

from pathlib import Path

from qcft.measure.stats import Difference
from qcft.report.arms import Arm
from qcft.report.document import Answer, Document, Sample, Section, Table
from qcft.report.pareto import _told
from qcft.report.plots import look
from qcft.report.standing import Standing, Verdict
from qcft.report.write import write_report
from qcft.store.results import Stage


def test_an_arm_that_gained_less_for_more_english_is_named_too():
    measured = Stage("eval/phase1", "probe-1", {}, 1.0, Path(), {})
    best, other = (
        Standing(Arm(name, (), {}), (english,), (4.0,), Difference(0.5, 0.4, 0.6, 9), gained, (measured,))
        for name, english, gained in (
            ("mixed", 3.9, Difference(-2.0, -2.1, -1.9, 9)), ("replayed", 2.9, Difference(-1.6, -1.7, -1.5, 9))
        )
    )  # fmt: skip
    told = _told(Verdict(best, (best,), {}, (other, 0.8, Difference(-1.0, -1.2, -0.9, 9))), 2)
    assert told == (
        "mixed: English lost 0.500 nats [0.400, 0.600] since phase1, the other languages gained 2.000 nats "
        "[1.900, 2.100] since the base; 1 gained less than 90% of the most; of these replayed (80%) kept 1.000 nats "
        "[0.900, 1.200] more English."
    )


def test_series_of_a_plot_are_told_apart_beyond_the_colours():
    looks = [look(i) for i in range(24)]
    for pair in ("line", "marker", "hatch"):
        assert len({(one.colour, getattr(one, pair)) for one in looks}) == 24


def test_control_characters_of_an_answer_are_shown_and_not_written(tmp_path):
    sample = Sample("why", "en", (Answer("base", "a\0b\x1b[2Jc\u202e", True),))
    write_report(tmp_path, Document("t", "q", "a", (Section("answers", "Answers", (sample,)),)))
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert not [c for c in text if (ord(c) < 32 and c != "\n") or c == "\u202e"]
        assert "a\\x00b\\x1b" in text.replace("\\\\", "\\")


def test_a_table_takes_its_head_from_its_rows_and_knows_which_columns_are_text():
    rows = [
        {"stage": "base", "of": "all", "NLL": "1.23", "why": "so"},
        {"stage": "in all", "of": "", "NLL": "", "why": ""},
    ]
    table = Table.of("t", "T", rows, ({"nll": n} for n in (1.234, None)), words=("why",), strong=(1,))
    assert table.head == ("stage", "of", "NLL", "why")
    assert table.rows == (("base", "all", "1.23", "so"), ("in all", "", "", ""))
    assert (table.words, table.strong) == ((0, 1, 3), {1})
    assert table.records == ({"nll": 1.234}, {"nll": None})
