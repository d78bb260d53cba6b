"""Parts of the report on their own: the answer's words, the looks of plots, text that is not text."""

import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from qcft.measure.stats import Difference
from qcft.report.arms import ArmRuns, Evidence
from qcft.report.cells import conclusion
from qcft.report.document import Document, Prose, Sample, Section, StageAnswer, Table
from qcft.report.languages import language_name
from qcft.report.layers import change_bars
from qcft.report.page import HEAD, shortened, to_page
from qcft.report.plots import WIDE, WIDTH, label, look, new_canvas
from qcft.report.standing import Standing, Verdict
from qcft.report.tidy import COLUMNS, tidy_table
from qcft.report.verdict import verdict_in_words
from qcft.report.write import write_report
from qcft.store.results import Run, Stage


def nats(value, low, high, seeds=3, rows=48):
    method = "max-t over rows, max-t over seeds (4 df)"
    return Difference(value, low, high, clusters=rows, seeds=seeds, method=method, compared=3, rows=rows)


def standing(name, english, gained, tokens=1000, seeds=3):
    """An arm as it is measured, trained on so many answer tokens."""
    measured = Stage("eval/phase1", "probe-1", {}, 1.0, Path(), {})
    trained = Stage("phase2", "train-1", {"exposure": [{"answer_tokens": tokens}]}, 1.0, Path(), {})
    run = Evidence(SimpleNamespace(seed=0), Run(name, Path(), {"phase2": trained}, {}), {})
    lost = nats(english - 3.4, english - 3.5, english - 3.3, seeds)
    return Standing(ArmRuns(name, (run,), {}), (english,) * seeds, (4.0,) * seeds, lost, gained, (measured,))


def test_the_answer_says_what_was_compared_and_what_was_distinguished():
    gain = nats(-2.0, -2.1, -1.9)
    best, other, third = standing("mixed", 3.9, gain, 1420), standing("plain", 4.0, gain), standing("gr", 3.95, gain)
    near = (best, other, third)
    more, less = nats(0.1, 0.05, 0.15), nats(0.05, -0.02, 0.12)
    over = "95% intervals of all 3 pairs of arms together, 48 rows, 3 seeds"
    of = "3 of 3 arms with at least 90% of the largest gain"
    unseen = "A difference below 0.070 nats could not have been detected (half the width of the interval)."
    trained = "mixed was trained on 42% more answer tokens than plain and gr."
    assert verdict_in_words(Verdict(best, near, {"plain": more, "gr": more}, None), 3) == (
        f"mixed kept the most English of the {of}: English loss rose by 0.500 nats per token (95% interval 0.400 to "
        "0.600, 48 rows, 3 seeds) since phase1, that of the other languages fell by 2.000 nats per token (95% interval "
        "1.900 to 2.100, 48 rows, 3 seeds) since the base. It has less English loss than plain (0.100 nats, 0.050 to "
        f"0.150) and gr (0.100 nats, 0.050 to 0.150); {over}. {trained}"
    )
    assert verdict_in_words(Verdict(best, near, {"plain": more, "gr": less}, None), 3) == (
        f"No single winner among the {of}: mixed cannot be distinguished from gr in English. It has less English loss "
        f"than plain (0.100 nats, 0.050 to 0.150); {over}. {unseen} {trained}"
    )
    assert verdict_in_words(Verdict(best, near, {"plain": less, "gr": less}, None), 3) == (
        f"No winner: of the {of}, mixed has the least English loss, but cannot be distinguished from plain and gr; "
        f"{over}. {unseen} {trained}"
    )


def test_no_winner_is_named_where_every_arm_has_one_run():
    gain = nats(-2.0, -2.1, -1.9, 1, 16)
    near = tuple(standing(name, english, gain, seeds=1) for name, english in (("a", 3.5), ("b", 3.25)))
    words = verdict_in_words(Verdict(near[1], near, {"a": nats(0.25, 0.2, 0.3, 1)}, None, tested=False), 3)
    assert words == (
        "No winner is named. One run each: differences between runs of one arm were not measured. `qcft ablate RECIPE "
        "--seeds 0,1,2` adds seeds. How English NLL changed in the 2 of 3 arms with at least 90% of the largest gain "
        "(nats per answer token, 48 rows) since phase1: a +0.100, b -0.150."
    )


def test_an_arm_that_gained_less_for_more_english_is_named_too():
    best, other = standing("mixed", 3.9, nats(-2.0, -2.1, -1.9)), standing("replayed", 2.9, nats(-1.6, -1.7, -1.5))
    words = verdict_in_words(Verdict(best, (best,), {}, (other, 0.8, nats(-1.0, -1.2, -0.9))), 2)
    assert words.startswith(
        "Only mixed, of 2 arms, has at least 90% of the largest gain: English loss rose by 0.500 nats"
    )
    assert words.endswith("replayed gained less (80% of the most) and has more English: 1.000 nats, 0.900 to 1.200.")
    unclear = verdict_in_words(Verdict(best, (best,), {}, (other, 0.8, nats(-1.0, -2.2, 0.2))), 2)
    assert "replayed" not in unclear


@pytest.mark.parametrize(
    ("value", "low", "high", "words"),
    [
        (0.158, 0.107, 0.208, "English got worse: its loss rose by 0.158 nats per token after phase1 (95% interval "
         "0.107 to 0.208, 16 rows)."),
        (-0.129, -0.145, -0.113, "English did not get worse: its loss fell by 0.129 nats per token after phase1 (95% "
         "interval 0.113 to 0.145, 16 rows)."),
        (0.01, -0.02, 0.04, "It is not clear whether English got worse: its loss rose by 0.010 nats per token after "
         "phase1 (95% interval of the change -0.020 to +0.040, 16 rows; a change below 0.030, half the "
         "interval's width, could not have been detected)."),
        (0.2, None, None, "It is not clear whether English got worse: its loss rose by 0.200 nats per token after "
         "phase1 (no interval: all observations are equal, 16 rows)."),
    ],
)  # fmt: skip
def test_the_headline_of_english(value, low, high, words):
    method = "no interval: all observations are equal" if low is None else "bootstrap-t"
    entry = asdict(Difference(value, low, high, clusters=16, method=method, rows=16)) | {"relative": 0.1}
    gains = {"phase2 es": -0.68, "phase2 pt": -0.64, "phase2 fr": 0.02}
    base = {name: entry | {"value": gain, "low": gain - 0.1, "high": gain + 0.1, "relative": gain}
            for name, gain in gains.items()}  # fmt: skip
    answers = [{"mean_tokens": 40.2, "finished": 0.5, "rows": 12}, {"mean_tokens": 17.0, "finished": 0.92, "rows": 12}]
    table = {
        "groups": [{"name": "phase1 en", "lang": "en", "english": True, "trained": True}]
        + [{"name": name, "lang": name[-2:], "english": False, "trained": True} for name in gains],
        "stages": [
            {"stage": f"eval/{name}", "name": name, "precision": "NF4", "answers": own}
            for name, own in (("base", answers[0]), ("phase1", answers[0]), ("phase2", answers[1]))
        ],
        "changes": [
            {"from": f"eval/{name}", "from_name": name, "to": "eval/phase2", "to_name": "phase2",
             "groups": {"phase1 en": entry, **base}}
            for name in ("phase1", "base")
        ],
        "kept": {},
    }  # fmt: skip
    assert conclusion(table) == [
        words,
        "Compared with the 4-bit base model, held-out loss (NLL) fell by 68% in Spanish and 64% in Portuguese; "
        "whether it changed in French (+2%) is not clear.",
        "English answers became shorter: 17 tokens on average instead of 40; 92% of them end by themselves (before: "
        "50%). 12 prompts.",
    ]
    # A second English group, of a kind that nothing trains on, has a sentence of its own that says so.
    table["groups"].append({"name": "test en", "lang": "en", "english": True, "trained": False})
    for change in table["changes"]:
        change["groups"]["test en"] = entry
    first, second, *_ = conclusion(table)
    assert first == words.replace(":", " (phase1 en):", 1)
    assert second == words.replace(":", " (test en, unlike anything trained on):", 1)


def test_a_gain_that_is_large_but_not_clear_is_not_called_small():
    gain = asdict(Difference(0.3, -0.1, 0.7, clusters=4, method="bootstrap-t", rows=4))
    change = {"from": "eval/base", "from_name": "base", "to": "eval/phase1", "to_name": "phase1", "groups": {}}
    kept = {"merged": {"share": None, "gain": gain}}
    table = {"groups": [], "stages": [], "changes": [change], "kept": kept}
    (sentence,) = conclusion(table)
    assert "0.300 nats per token [-0.100, +0.700] is below 0.05 or its interval includes zero" in sentence


def test_languages_have_names_and_unknown_codes_are_unmodified():
    assert [language_name(code) for code in ("es", "pt-BR", "xx")] == ["Spanish", "Portuguese (pt-BR)", "xx"]


def test_series_of_a_plot_differ_in_more_than_colour():
    looks = [look(i) for i in range(24)]
    for pair in ("line", "marker", "hatch"):
        assert len({(one.colour, getattr(one, pair)) for one in looks}) == 24


def test_commands_in_sentences_are_code_on_the_page_and_nothing_else_is(tmp_path):
    sections = (Section("notes", "Notes", (Prose(("run `qcft ls <b>`", "one ` alone <i>")),)),)
    write_report(tmp_path, Document("t", "q", "`qcft gc` helps", sections))
    page = (tmp_path / "report.html").read_text()
    assert "<code>qcft gc</code> helps" in page
    assert "<li>run <code>qcft ls &lt;b&gt;</code></li>" in page
    assert "<li>one ` alone &lt;i&gt;</li>" in page
    assert "run `qcft ls" in (tmp_path / "report.md").read_text()


def test_control_characters_of_an_answer_are_shown_and_not_written(tmp_path):
    sample = Sample("why", "en", (StageAnswer("base", "a\0b\x1b[2Jc\u202e", True),))
    write_report(tmp_path, Document("t", "q", "a", (Section("answers", "Answers", (sample,)),)))
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert not [c for c in text if (ord(c) < 32 and c != "\n") or c == "\u202e"]
        assert "a\\x00b\\x1b" in text.replace("\\\\", "\\")


LONG = "Once upon a time there was a passage. " * 20 + "Who said so?"


def test_long_texts_are_shortened_and_not_lost():
    assert shortened("short\n" * 9) == ""
    head, end = shortened(LONG, 20).split(" … ")
    assert LONG.startswith(head)
    assert len(head) <= HEAD
    assert (end, len(end)) == (LONG[-20:], 20)
    many = "\n".join("abcdefghijklmnopqrst")
    assert shortened(many) == many[:13] + " …"
    assert shortened("ab" * 400, 3) == "ab" * (HEAD // 2) + " … bab"
    page = to_page(
        Document("t", "q", "a", (Section("s", "S", (Sample(LONG, "en", (StageAnswer("x", many, False),)),)),))
    )
    assert page.count(f">{LONG}</p>") == 1
    assert page.count(f">{many}<span") == 1
    assert page.count("<summary>show all</summary>") == 2
    assert "download" not in page  # a page alone has no files beside it


def test_a_tidy_table_has_one_number_a_row():
    own = {"english_value": 0.5, "english_low": 0.4, "english_high": 0.6, "english_rows": 16}
    record = {
        "arm": "one",
        "seed": 1,
        "lang": "es",
        "front": True,
        "nll": 2.0,
        "none": None,
        **own,
        "value": 0,
        "low": -1,
    }
    rows = tidy_table(Table("t", "", (), (), (record,), measure="change"))
    assert [*rows[0]] == [*COLUMNS, "front", "rows"]
    assert [(row["measure"], row["value"], row["low"], row["high"], row["rows"]) for row in rows] == [
        ("nll", 2.0, None, None, None), ("english", 0.5, 0.4, 0.6, 16), ("change", 0, -1, None, None)
    ]  # fmt: skip
    assert {(row["arm"], row["seed"], row["language"], row["front"]) for row in rows} == {("one", 1, "es", True)}
    words = {"what": "python", "value": "3.11"}
    assert tidy_table(Table("t", "", (), (), (words,))) == [words]


@pytest.mark.parametrize("width", [WIDTH, WIDE])
def test_the_titles_and_names_of_axes_are_complete(width):
    """However long: within the figure, and none on another."""

    def body(axes):
        axes.barh(range(3), [1, 2, 3])
        names = ["a", "an arm with a name that is much too long for a plot, and another arm", "c"]
        axes.set_yticks(range(3), names)
        label(axes, "tokens, of which there are more than this plot is wide " * 2, "English NLL, nats per answer token")

    canvas = new_canvas(body, width, 2.4, 1)
    canvas.draw_without_rendering()
    (axes,) = canvas.axes
    for text in (axes.xaxis.label, axes.yaxis.label, *axes.get_yticklabels()):
        box = text.get_window_extent()
        assert box.x0 >= -1
        assert box.x1 <= canvas.bbox.x1 + 1
        assert box.y0 >= -1
        assert box.y1 <= canvas.bbox.y1 + 1
    lower, middle, upper = (text.get_window_extent() for text in axes.get_yticklabels())
    assert lower.y1 <= middle.y0
    assert middle.y1 <= upper.y0


def test_a_legend_is_beside_a_wide_plot_and_close_under_a_narrow_one():
    """No mark outside the axes takes room between them: a phase without frozen layers once did."""
    changes = {"phase1": {0: 1.0, 1: 1.0}, "phase2": {1: 1.0}}
    figure = change_bars(changes, {"phase1": [], "phase2": [0]}, 2)
    heights = [float(re.search(r'<svg[^>]* height="([\d.]+)pt"', svg)[1]) for svg in (figure.svg, figure.wide)]
    assert heights[0] > heights[1]
    axis = re.compile(r'<g id="patch_2">\s*<path d="M [\d.]+ ([\d.]+)')  # the axes' lower left corner
    for svg, height, most in zip((figure.svg, figure.wide), heights, (90, 45), strict=True):
        assert height - float(axis.search(svg)[1]) < most


def test_a_table_has_the_head_of_its_rows_and_knows_which_columns_are_text():
    rows = [
        {"stage": "base", "of": "all", "NLL": "1.23", "why": "so"},
        {"stage": "in all", "of": "", "NLL": "", "why": ""},
    ]
    table = Table.of("t", "T", rows, ({"nll": n} for n in (1.234, None)), words=("why",), strong=(1,))
    assert table.head == ("stage", "of", "NLL", "why")
    assert table.rows == (("base", "all", "1.23", "so"), ("in all", "", "", ""))
    assert (table.words, table.strong) == ((0, 1, 3), {1})
    assert table.records == ({"nll": 1.234}, {"nll": None})
