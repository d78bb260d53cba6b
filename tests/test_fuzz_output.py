"""Random text in labels, rows, names, answers and errors: nothing that is printed steers a terminal, or is markup."""

import io
import json
import re
import sys
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcft import api
from qcft.check.recipe import check_recipe
from qcft.cli.listings import replay_shown
from qcft.events import ArmChanged, Mixed, Note, Progress, SourceShare, StepBegun, StepEnded, Watch
from qcft.recipe import load_recipe
from qcft.report.markdown import to_markdown
from qcft.report.page import to_page
from qcft.report.write import to_csv
from qcft.terminal import check_view, tables
from qcft.terminal.ablation_view import ArmsReporter
from qcft.terminal.progress import Reporter
from qcft.terminal.streams import clean_streams

from .helpers.fuzz import many, steering
from .helpers.terminal import steers
from .test_bad_text import wild_document
from .test_old_runs import ARCHIVES, unpacked

STATES = ("to do", "running", "done", "failed")


class Stream(io.TextIOWrapper):
    """A terminal, or a file."""

    def __init__(self, terminal):
        super().__init__(io.BytesIO(), encoding="utf-8", newline="")
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode()


@contextmanager
def printed(terminal):
    """What is printed in the block, on both streams, must steer nothing."""
    out, err = Stream(terminal), Stream(terminal)
    with redirect_stdout(out), redirect_stderr(err):
        clean_streams()
        yield out
    assert not steers(out.text() + err.text(), moves=terminal)


@many
@given(st.lists(steering, min_size=3, max_size=3), st.booleans())
def test_lines_and_tables(texts, terminal):
    with printed(terminal):
        tables.print_rows(texts, [texts, [text[::-1] for text in texts]])
        tables.print_lines(texts)
        tables.say(texts[0], "dim")
        tables.print_error(*texts[:2])
        tables.print_answer(*texts[:2])
    with printed(terminal) as out:
        tables.print_json({texts[0]: texts})
    if "***" not in out.text():  # what looks like a URL's login is redacted here, too
        assert json.loads(out.text()) == {texts[0]: texts}


@many
@given(steering, st.booleans())
def test_what_libraries_print(text, terminal):
    with printed(terminal):
        print(text)
        print(text, end="", file=sys.stderr)
        print(warnings.formatwarning(text, UserWarning, "x.py", 1), file=sys.stderr)  # pytest keeps real ones
        try:
            raise ValueError(text)
        except ValueError:
            sys.excepthook(*sys.exc_info())


@many
@given(st.lists(steering, min_size=4, max_size=4), st.booleans(), st.sampled_from(STATES))
def test_the_live_view(texts, terminal, state):
    share = SourceShare(texts[0], 3, 9, 4, {texts[1]: 2})
    steps = [
        Note(texts[0], "warning"),
        StepBegun("x", texts[1], 1, 2, "new"),
        Progress(texts[2], 1, 3, "rows", {"a": texts[3]}),
        Progress(texts[2], 2, 3, texts[3]),
        Mixed(texts[0], (share,), 2, 1.5, texts[1]),
        StepEnded("x", texts[1], 2.0, texts[2]),
    ]
    arms = [ArmChanged(f"{i}{text}", text, i, i, 4, "running", texts[3]) for i, text in enumerate(texts)]
    for reporter, events in ((Reporter, steps), (ArmsReporter, [*steps, *arms, *steps])):
        with printed(terminal):
            shown = reporter()
            for event in events:
                shown(event)
            if reporter is ArmsReporter:
                print(texts[0])  # a library, in the midst of it
                shown(ArmChanged(f"0{texts[0]}", texts[0], 0, 0, 4, state, texts[1]))
            shown.close()


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """What show, replay and check print of a run."""
    folder = unpacked(ARCHIVES[0], tmp_path_factory.mktemp("old"))
    runs = folder / "runs"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run = api.read("small", runs)
        return {
            "show": dict(run.table),
            "replay": replay_shown("small", run.stages, 3, False),
            "check": check_recipe(load_recipe("recipe.yaml"), runs, Watch()),
        }


def labels(node, keys):
    """The texts of a document that come from data, a recipe or a model: no keys, but those that are languages."""
    if isinstance(node, str):
        yield from [node] if node not in keys - {"en", "es"} else []
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
        yield from labels(child, keys)


def words_of(node):
    """The keys of a document, and the texts that the code looks at."""
    yield from ("done", "to do", "probe", "replay", "nf4", "cpu", "none")
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else []:
        yield from words_of(child)
    yield from node if isinstance(node, dict) else ()


@many
@given(st.sampled_from(["show", "replay", "check"]), steering, st.booleans())
def test_documents_whose_every_label_is_anything(documents, name, text, terminal):
    document = json.loads(json.dumps(documents[name]))
    written = json.dumps(document)
    for number, label in enumerate(dict.fromkeys(labels(document, {*words_of(document)}))):
        written = written.replace(json.dumps(label), json.dumps(f"{number}{text}"))
    changed = json.loads(written)
    with printed(terminal):
        if name == "show":
            tables.print_table(changed)
        elif name == "replay":
            tables.print_replay(changed)
        else:
            check_view.print_check(changed)
        tables.print_json(changed)


MARKDOWN = [
    "![",
    "](",
    "[",
    "]",
    "(",
    ")",
    "<",
    ">",
    "`",
    "```",
    "|",
    "\\",
    "http://x",
    "www.x.y",
    "\n\n",
    "[1]: ",
    "img",
    " ",
    "&lt;",
    "_",
    "*",
    "#",
]


@many
@given(steering | st.lists(st.sampled_from(MARKDOWN), max_size=12).map("".join))
def test_reports(text):
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    text = text.encode(errors="replace").decode()  # half characters are refused, or replaced, before
    document = wild_document(text)
    page = to_markdown(document)
    assert not re.search(r"<(img|a)\b", markdown.render(page))
    assert not re.search(r"<(img|a)[ >]", to_page(document).replace('<a href="#a">', ""))
    assert not steers(to_csv(next(document.tables())).replace("\r", ""))


@many
@given(
    st.lists(steering, min_size=1, max_size=2),
    st.sampled_from(["", "show", "run", "report", "check", "ls", "similarity"]),
)
def test_any_words_on_the_command_line(qcft, words, command):
    code, out, err = qcft(*filter(None, [command]), *words)
    assert not steers(out + err)
    assert code in {0, 2}, err
    assert "error: unexpected" not in err
    assert code == 0 or re.fullmatch(r"error: [^\n]+\nhint: [^\n]+\n", err), err
