"""Text that steers a terminal, is markup, or a secret: refused or printed harmlessly, wherever it comes from."""

import csv
import json
import os
import pty
import re
import select
import subprocess
import sys
import warnings
from pathlib import Path
from unicodedata import bidirectional, category

import pytest
import yaml

from qcft.report.document import Document, Listing, Prose, Sample, Section, StageAnswer, Table
from qcft.report.markdown import code, to_markdown
from qcft.report.page import to_page
from qcft.report.plots import draw
from qcft.report.tidy import COLUMNS
from qcft.report.write import to_csv
from qcft.safe import IN_JSON, STEERING, plain

from .helpers.bad_input import check_refused
from .helpers.terminal import steers
from .helpers.tiny import write_rows

ROOT = Path(__file__).parents[1]
CLEAR, CLIPBOARD, TITLE = "\x1b[2J", "\x1b]52;c;aGk=\x07", "\x1b]0;title\x1b\\"
LINK, C1, BIDI = (
    "\x1b]8;;http://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "\x9b2J\x9d0;t\x9c",
    "\u202etxt\u2066\u200f\u061c",
)
MARKUP = "[/] [red]x[/red] [link=http://evil.example]y[/link] :warning:"
HOSTILE = CLEAR + CLIPBOARD + TITLE + LINK + C1 + BIDI + "\x07\r" + MARKUP
TOKEN = "Qz7xK9vW" * 5


def setting(*texts):
    return ["run", "recipe.yaml", *(part for text in texts for part in ("--set", text))]


CASES = {
    "bytes that are not text": (["similarity", "a", "\udcff"], r"'\udcff' is not UTF-8 text"),
    "an escape in a command": ([f"trian{CLEAR}"], r"trian\x1b[2J"),
    "a command that is markup": (["[/]"], "[/]"),
    "an escape in an option": (["run", f"--rep{C1}ly"], r"\x9b2J"),
    "an escape in a number": (["check", "recipe.yaml", "--rows", f"1{CLEAR}"], "--rows"),
    "a recipe by an escape": (["run", f"x{CLIPBOARD}"], r"\x1b]52"),
    "a recipe that is markup": (["run", MARKUP], "[/] [red]"),
    "a run by an escape": (["show", f"x{LINK}"], r"\x1b]8"),
    "a run turned round": (["show", f"x{BIDI}"], r"\u202etxt\u2066\u200f\u061c"),
    "a run that is markup": (["show", MARKUP], "[red]x"),
    "a model by an escape": (["phase1", "x", "--model", f"./m{TITLE}", "--data", "good.jsonl"], r"\x1b]0"),
    "data by an escape": (setting(f"phase1.data=[{json.dumps(f'd{HOSTILE}.jsonl')}]"), r"\x1b[2j"),
    "a key of escapes": (setting(f"phase1{CLEAR}.x=1"), r"\x1b[2j"),
    "a name of escapes": (setting(f'name="{CLEAR}"'), "name"),
    "a phase of escapes": (setting(json.dumps("x") + f"{CLEAR}=1"), r"\x1b"),
    "escapes in YAML's error": (["run", "bad.yaml"], "bad.yaml"),
    "a row's role of escapes": (setting('phase1.data=["roles.jsonl"]'), "roles.jsonl"),
    "an OAuth token in a recipe": (setting(f"model.name=hf_oauth_{TOKEN}"), "access token or password"),
    "an organisation's token": (setting(f"model.name=api_org_{TOKEN[:34]}"), "access token or password"),
    "a token of another kind": (setting(f"model.name=ghp_{TOKEN[:36]}"), "access token or password"),
    "a password with an @": (setting(f'phase1.data=["https://me:pa@{TOKEN}@h/x.jsonl"]'), "access token or password"),
    "a password with a slash": (setting(f'phase1.data=["https://me:p/{TOKEN}@h/x"]'), "access token or password"),
    "a token in a query": (setting(f'phase1.data=["https://h/x.jsonl?token={TOKEN}"]'), "access token or password"),
    "a signed URL": (setting(f'phase1.data=["https://h/x?X-Amz-Signature={TOKEN}"]'), "access token or password"),
    "a signed URL as the data": (["phase1", "x", "--model", "m", "--data", f"https://h/x?sig={TOKEN}"], "access token"),
}


@pytest.fixture
def place(raw_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    raw = {**raw_recipe, "phases": raw_recipe["phases"][:1]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    (tmp_path / "bad.yaml").write_text(f"name: [a\n# {BIDI}\n\x1b[2J: ]x{{")
    rows = [{"instruction": f"what {i}", "output": "red"} for i in range(40)]
    write_rows(tmp_path / "good.jsonl", rows)
    write_rows(tmp_path / "roles.jsonl", [{"messages": [{"role": HOSTILE, "content": "x"}]}] * 9)
    return tmp_path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-"))
def test_bad_text_gives_two_lines_that_steer_nothing(qcft, place, case):
    def clean(*arguments):
        code, out, err = qcft(*arguments)
        assert not steers(out + err)
        assert TOKEN[:16] not in out + err
        return code, out, err

    check_refused(clean, place, *CASES[case])


def on_a_terminal(place, *arguments):
    """What a process prints on a terminal of its own."""
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": "120"}
    command = [sys.executable, "-c", f"import sys; from qcft.cli import main; sys.argv[1:] = {arguments!r}; main()"]
    with subprocess.Popen(command, cwd=place, env=environment, stdout=slave, stderr=slave, stdin=slave) as process:
        os.close(slave)
        said = b""
        while select.select([master], [], [], 200)[0]:
            try:
                said += os.read(master, 1 << 16)
            except OSError:  # the other end is closed
                break
    os.close(master)
    return process.returncode, said.decode()


def test_rows_languages_and_file_names_steer_no_terminal(qcft, place, raw_recipe):
    """On a terminal, and off it: checked, run, shown, reported, listed."""
    rows = [{"instruction": f"what {i} {HOSTILE}", "output": f"red {HOSTILE}"} for i in range(60)]
    name = f"x{HOSTILE}".replace("/", "%")[:80] + ".jsonl"
    write_rows(place / name, rows)
    write_rows(place / "good.jsonl", [{"instruction": f"what {i}", "output": "red"} for i in range(60)])
    data = [{"path": name, "lang": f"x{HOSTILE}", "take": 12}, {"path": "good.jsonl", "lang": "[/]", "take": 12}]
    train = {"lr": 1e-3, "batch": 4, "max_length": 400, "long_rows": "cut"}
    recipe = {**raw_recipe, "phases": [{"name": "phase1", "data": data, "train": train}]}
    (place / "hostile.yaml").write_text(yaml.safe_dump(recipe))
    code, said = on_a_terminal(place, "run", "hostile.yaml")
    assert code == 0, said
    assert not steers(said, moves=True)
    assert r"\x1b[2J" in said
    assert "[red]x[/red]" in said
    for arguments in (
        ["check", "hostile.yaml"], ["show"], ["show", "--json"], ["report"],
        ["report", "--json"], ["ls"], ["ls", "--json"], ["run", "hostile.yaml", "--dry-run"],
    ):  # fmt: skip
        code, out, err = qcft(*arguments)
        assert code == 0, err
        assert not steers(out + err), arguments
        if arguments == ["show", "--json"]:
            assert any(group["lang"] == f"x{HOSTILE}" for group in json.loads(out)["groups"])
    code, said = on_a_terminal(place, "show")
    assert code == 0, said
    assert not steers(said, moves=True)
    for file in (place / "runs" / "tiny" / "report").rglob("*"):
        if file.suffix in {".html", ".md", ".svg", ".csv"}:
            assert not steers(file.read_text()), file
    page = (place / "runs" / "tiny" / "report" / "report.md").read_text()
    assert "<script" not in page


WILD = [
    "![x](http://evil.example/a.png)", "[x](javascript:alert)", "<img src=http://evil.example>", "http://evil.example",
    "www.evil.example", "<http://evil.example>", "`x` ```", "a | b\n| c |", "![x][1]\n\n[1]: http://evil.example",
    "$\\frac$", "x](http://evil.example)", "\\[x](http://evil.example)",
]  # fmt: skip


def wild_document(text):
    table = Table("t", text, ("what", text), ((text, "[-0.12, +0.34]"),), ({"what": text, text: -0.12},), text)
    sample = Sample(text, "en", (StageAnswer(text, text, True),))
    blocks = (table, sample, Listing(text, f"{text}\n", "yaml"), Prose((text,)))
    return Document(text, text, text, (Section("a", text, blocks),))


@pytest.mark.parametrize("text", WILD)
def test_no_link_image_or_html_comes_of_a_reports_texts(text):
    """Read by a Markdown parser that takes bare addresses for links, as GitHub does."""
    markdown = pytest.importorskip("markdown_it")
    options = {"html": True, "linkify": False}
    page = to_markdown(wild_document(text))
    assert "[-0.12, +0.34]" in page
    shown = markdown.MarkdownIt("commonmark", options).enable("table").render(page)
    assert not re.search(r"<(img|a|script)\b", shown), shown
    outside = re.sub(r"(?s)(`{3,}).*?\n\1", "", page)
    assert not re.search(r"(?i)http://|\bwww\.", outside)
    assert not re.search(r"<(img|a|script)[ >]", to_page(wild_document(text)).replace('<a href="#a">', ""))


def test_a_code_span_holds_what_it_is_given():
    assert code("a/b") == "`a/b`"
    assert code("a`b\n```") == "```` a`b ``` ````"


def test_a_csv_cell_is_never_a_formula():
    texts = [
        "=1+1",
        "+cmd|' /C calc'!A0",
        "-2+3",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "-0.12",
        "+1e-5",
        "es",
        "-",
        CLEAR,
    ]
    records = tuple({"text": text, "=head": value} for text, value in zip(texts, [-0.12, 2, 3] * 4, strict=True))
    rows = list(csv.reader(to_csv(Table("t", "", (), (), records)).splitlines(keepends=True)))
    assert rows[0] == [*COLUMNS, "text"]
    shown = [row[-1] for row in rows[1:]]
    assert shown[:7] == ["'=1+1", "'+cmd|' /C calc'!A0", "'-2+3", "'@SUM(A1)", "'\t=1", r"'\x0d=1", "'\n=1"]
    assert shown[7:] == ["-0.12", "+1e-5", "es", "'-", r"\x1b[2J"]
    assert [row[5:7] for row in rows[1:4]] == [["'=head", "-0.12"], ["'=head", "2"], ["'=head", "3"]]


@pytest.mark.parametrize("label", ["$\\frac$", "$x$", HOSTILE, "\0", "日本 🦜", "<script>&", "_", "-->"])
def test_a_plot_takes_any_label(label):
    def body(axes):
        axes.plot([1, 2], [1, 2], label=label)
        axes.set_title(label)
        axes.set_xticks([1, 2], [label, label])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Matplotlib currently does not support Arabic")  # before 3.11
        figure = draw("n", "c", "a", body)
    assert not steers(figure.svg)
    assert "<script" not in figure.svg


def test_every_character_that_steers_is_known():
    """C0 without newline and tab, C1, and what turns the direction of text or ends a line."""
    turning = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    for number in {*range(0x110000)} - {*b"\n\t"}:
        character = chr(number)
        if category(character) in {"Cc", "Zl", "Zp"} or bidirectional(character) in turning:
            assert number in STEERING, hex(number)
    assert plain(HOSTILE) == plain(plain(HOSTILE))
    assert json.loads(json.dumps(HOSTILE, ensure_ascii=False).translate(IN_JSON)) == HOSTILE
