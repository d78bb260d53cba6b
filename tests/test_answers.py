"""Answers of a run's stages side by side and in a conversation, from the command line and from Python."""

import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import qcft as package
from qcft import InputError, api
from qcft.data.encode import Encoder
from qcft.events import Watch
from qcft.files import read_json
from qcft.models.generate import Sampling, answer_prompts
from qcft.models.load import load_model
from qcft.models.stream import stream_answer
from qcft.recipe import Model, load_recipe
from qcft.report.comparison import answer_note, summary_rows
from qcft.report.tidy import tidy_rows
from qcft.terminal import compare_view, streams

from .helpers.bad_input import check_refused, listing
from .helpers.terminal import steers
from .helpers.tiny import make_recipe

CAT = "what color is the cat number 5"
NOTEBOOK = Path(__file__).parents[1] / "recipes" / "notebook.ipynb"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model, color_data):
    """A folder with data, a recipe, and two finished runs, `tiny` and `other`, which share their phase 1."""
    place = tmp_path_factory.mktemp("made")
    shutil.copytree(color_data, place / "data")
    raw = make_recipe(tiny_model, place / "data") | {"merge": {"refuse_below": None}}
    (place / "recipe.yaml").write_text(yaml.safe_dump(raw))
    for name in ("other", "tiny"):
        changes = {"name": name, "phase2.freeze": "none" if name == "other" else "first:1"}
        api.run(load_recipe(place / "recipe.yaml", changes), runs=place / "runs")
    return place


@pytest.fixture
def place(made, qcft, monkeypatch):
    """The module's folder as the working folder; nothing in it may change."""
    monkeypatch.chdir(made)
    before = listing(made / "runs")
    yield made
    assert listing(made / "runs") == before


def compared(qcft, *flags):
    code, out, err = qcft("compare", "tiny", "--json", *flags)
    assert code == 0, err
    return json.loads(out), err


# Side by side


def test_english_answers_are_those_of_when_the_stages_were_measured(place, qcft):
    found, err = compared(qcft, "--lang", "en", "-n", "3")
    assert found["stages"] == ["base", "phase1", "phase2"]
    for stage in found["stages"]:
        measured = read_json(place / "runs/tiny/eval" / stage / "answers.json")
        assert len(measured) == 3
        for one, before in zip(found["prompts"], measured, strict=True):
            answer = one["answers"][stage]
            assert (one["prompt"], answer["text"]) == (before["prompt"], before["text"])
            assert (answer["tokens"], answer["finished"]) == (before["tokens"], before["finished"])
            assert one["reference"] in {"red red", "blue blue", "green green"}
    assert err.count("loading the weights of") == 2  # phase 1 is switched on the base's, phase 2 has merged ones


def test_a_few_rows_of_every_language_are_answered_by_default_or_the_given_prompts(place, qcft):
    found, _ = compared(qcft, "--stage", "phase1")
    assert [one["lang"] for one in found["prompts"]] == ["en", "en", "es", "es", "pt", "pt"]
    (place / "prompts.txt").write_text(f"\ufeff{CAT}\n\n  two dogs  \n", encoding="utf-8")
    found, _ = compared(qcft, "--stage", "phase1", "--prompt", "a bird", "--prompts", "prompts.txt")
    assert [one["prompt"] for one in found["prompts"]] == ["a bird", CAT, "two dogs"]
    assert {(one["lang"], one["reference"]) for one in found["prompts"]} == {(None, None)}


def test_two_runs_share_what_is_the_same_model(place, qcft):
    found, err = compared(qcft, "--with", "other", "--prompt", CAT)
    assert found["stages"] == ["base", "tiny.phase2", "other.phase2"]
    found, err = compared(qcft, "--with", "other", "--prompt", CAT, "--stage", "phase1", "--stage", "phase2")
    assert found["stages"] == ["tiny.phase1", "tiny.phase2", "other.phase2"]
    assert "other.phase1 is the same model as tiny.phase1" in err
    assert err.count("loading the weights of") == 2  # both phases 2 lie on the same merged weights


DOCUMENT = {
    "max_new_tokens": 9, "stages": ["base", "phase2"],
    "prompts": [
        {
            "prompt": "¿Qué es <b>\x1b[31m?", "held_out": "phase2 es", "lang": "es", "reference": "Un color.",
            "answers": {
                "base": {"text": "A colour", "tokens": 9, "finished": False, "lang": "en"},
                "phase2": {"text": "Es un color", "tokens": 1, "finished": True, "lang": "es"},
            },
        }
    ],
}  # fmt: skip


def test_notes_and_figures_of_answers():
    answers = DOCUMENT["prompts"][0]["answers"]
    assert [answer_note(answers["base"]), answer_note(answers["phase2"])] == ["9 tokens, cut off, en", "1 token, es"]
    assert answer_note(answers["phase2"] | {"lang": None}) == "1 token, language unclear"
    assert answer_note(answers["phase2"] | {"lang": None, "text": "", "tokens": 0}) == "0 tokens"
    assert [[*row.values()] for row in summary_rows(DOCUMENT)] == [
        ["base", "9", "0 of 1", "0 of 1"],
        ["phase2", "1", "1 of 1", "1 of 1"],
    ]


@pytest.mark.parametrize(("width", "together"), [(160, True), (80, False)])
def test_columns_where_the_terminal_is_wide(capsys, monkeypatch, width, together):
    monkeypatch.setattr(streams, "WIDE", width)
    compare_view.print_comparison(DOCUMENT)
    out = capsys.readouterr().out
    assert any("A colour" in line and "Es un color" in line for line in out.splitlines()) == together
    assert max(map(len, out.splitlines()[:-1])) <= width
    assert not steers(out)
    assert "<b>\\x1b[31m" in out


def test_the_page_holds_the_answers_as_text(place, qcft, tmp_path):
    page = tmp_path / "page.html"
    code, out, err = qcft("compare", "tiny", "--prompt", "<script>alert(1)</script>", "--stage", "base", "--to", page)
    assert code == 0, err
    assert "ended by themselves" in out
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "8 tokens" in text


# In a conversation


def test_a_streamed_answer_is_the_answer(tiny_model, tokenizer):
    model, encoder = load_model(tiny_model, Model(name=str(tiny_model))), Encoder(tokenizer)
    for number, temperature in enumerate((0.0, 3.0, 3.0, 3.0)):
        ids, sampling, pieces = tokenizer("the cat runs")["input_ids"], Sampling(40, temperature, seed=number), []
        found = stream_answer(model, tokenizer, ids, encoder.end_ids, sampling, pieces.append, lambda: False)
        (whole,) = answer_prompts(model, tokenizer, [ids], encoder.end_ids, sampling, 1, Watch())
        assert found == whole
        assert "".join(pieces) == whole.text
    pieces = []
    found = stream_answer(model, tokenizer, ids, encoder.end_ids, Sampling(40), pieces.append, lambda: len(pieces) == 2)
    assert not found.finished
    assert found.tokens < 40
    assert "".join(pieces) == found.text


def chatted(qcft, monkeypatch, lines, *flags):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return qcft("chat", "tiny", "--max-new-tokens", "8", *flags)


def test_a_chat_in_a_pipe_answers_line_by_line(place, qcft, monkeypatch, tmp_path):
    saved = tmp_path / "saved.jsonl"
    lines = [CAT, "", "/both", "two dogs", f"/save {saved}", "/stage base", "/reset", "//stage", "/quit", "never"]
    code, out, err = chatted(qcft, monkeypatch, lines)
    assert code == 0, err
    answers = out.splitlines()
    assert answers[0] == "red"
    assert [line.split()[0] for line in answers[1:3]] == ["[phase2]", "[base]"]
    assert not steers(out)
    kept = {one["stage"]: one["messages"] for one in map(json.loads, saved.read_text().splitlines())}
    assert [m["content"] for m in kept["phase2"] if m["role"] == "user"] == [CAT, "two dogs"]
    assert kept["base"][:2] == kept["phase2"][:2]  # base came in later, and sees what was said
    assert "line 8: the answer was cut off at 8 tokens" in err


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["/stage phase9"], "the run 'tiny' has no stage 'phase9'"),
        (["/stage"], "/stage needs NAME"),
        (["/save"], "/save needs FILE"),
        (["/save new.jsonl"], "there is nothing to save yet"),
        (["/save recipe.yaml"], "'recipe.yaml' exists already"),
        (["/bot"], "there is no command '/bot'"),
        (["/both phase2"], "phase2 is answering already"),
        (["red " * 600], "the prompt cannot be used: it has "),
        ([], "stdin is empty"),
    ],
)
def test_bad_lines_in_a_pipe(place, qcft, monkeypatch, lines, says):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    check_refused(qcft, place, ["chat", "tiny", "-q"], says)


def test_bytes_that_are_not_text_in_a_pipe(place, qcft, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), "utf-8"))
    check_refused(qcft, place, ["chat", "tiny", "-q"], "stdin is not UTF-8 text")


class Terminal:
    """`qcft` in a terminal of its own."""

    def __init__(self, *arguments):
        self.fd, child = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qcft", *arguments], stdin=child, stdout=child, stderr=child,
            env={**os.environ, "TERM": "dumb"}, start_new_session=True,
        )  # fmt: skip
        os.close(child)
        self.seen = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        os.close(self.fd)

    def until(self, text, seconds=300):
        """What is printed up to a text."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert select.select([self.fd], [], [], max(0, end - time.monotonic()))[0], self.seen
            try:
                self.seen += os.read(self.fd, 4096).decode()
            except OSError:  # closed
                break
        before, found, self.seen = self.seen.partition(text)
        assert found, before
        return before + found

    def type(self, text):
        os.write(self.fd, text.encode())

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)


def test_a_chat_in_a_terminal(place):
    """Ctrl-C ends an answer, then the chat; nothing that the model writes steers the terminal."""
    with Terminal("chat", "tiny", "--stage", "base", "--temperature", "5", "--max-new-tokens", "400") as terminal:
        seen = terminal.until("> ")
        terminal.type("/stage phase9\n")
        seen += terminal.until("hint: ")
        seen += terminal.until("> ")
        terminal.type(f"{CAT}\n")
        seen += terminal.until(f"{CAT}\r\n") + terminal.until("\\x")  # an escaped control character of the answer
        terminal.interrupt()
        seen += terminal.until("stopped") + terminal.until("> ")
        time.sleep(1)  # a signal between the prompt and the wait for a key is handled only at the next key
        terminal.interrupt()
        assert terminal.process.wait(60) == 0
    assert not steers(seen, moves=True)


# Bad input


REFUSED = {
    "a stage that is not there": (["--stage", "phase3"], "the run 'tiny' has no stage 'phase3'"),
    "a language without rows": (["--lang", "xx"], "no held-out rows in 'xx'"),
    "the run itself": (["--with", "tiny"], "is the run itself"),
    "another run that is not there": (["--with", "none"], "there is no run 'none'"),
    "a prompt longer than the model's positions": (["--prompt", "red " * 600], "cannot be used: it has "),
    "answers longer than the model's positions": (["--prompt", CAT, "--max-new-tokens", "9999"], "cannot be used"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.replace(" ", "-"))
def test_bad_comparisons(place, qcft, case):
    flags, says = REFUSED[case]
    check_refused(qcft, place, ["compare", "tiny", *flags, "-q"], says)


# From Python


def test_the_public_names_are_shown():
    assert {"run", "open", "runs", "compare", "chat", "merge", "export", "check_recipe"} <= set(dir(package))
    import pydoc

    text = pydoc.plain(pydoc.render_doc(package))
    for name in package.__all__:
        assert name in text
    assert "The names of the runs in a folder, the latest first" in text


def test_an_error_shows_its_hint(place):
    with pytest.raises(InputError) as caught:
        package.open("tony")
    assert (
        str(caught.value) == "there is no run 'tony' in 'runs'\nhint: did you mean 'tiny'? existing runs: tiny, other"
    )


def test_a_run_in_python(place, tmp_path):
    assert package.runs() == ["tiny", "other"]
    run = package.open("tiny")
    assert isinstance(run, package.Run)
    assert len(repr(run)) < 300
    frame = run.frame()
    assert [*frame.columns][:5] == ["arm", "seed", "stage", "language", "rows_of"]
    for stage in run.table["stages"]:
        name = stage["stage"].removeprefix("eval/")
        own = frame[(frame.stage == name) & (frame.measure == "nll")].set_index("rows_of").value
        assert own.to_dict() == {group: score["nll"] for group, score in stage["groups"].items()}
    change = frame[(frame.measure == "nll since base") & (frame.rows_of == "phase2 es")]
    assert (change.low <= change.value).all()
    assert (change.value <= change.high).all()
    assert len(change) == 1
    assert frame[frame.measure == "nll"].low.isna().all()
    html = run._repr_html_()
    assert "<table>" in html
    assert html.count("data:image/svg+xml;base64,") == 1
    assert "<script" not in html
    written = run.report(tmp_path / "report")
    assert written.is_file()
    exported = package.export(run, to=tmp_path / "adapter", adapter_only=True)
    assert (Path(exported["folder"]) / "adapter_config.json").is_file()


def test_tasks_and_averages_are_rows_too():
    interval = {"value": 0.1, "low": 0.0, "high": 0.2}
    task = {"task": "xquad_es", "lang": "es", "metric": "exact_match"}
    scored = {"stage": "phase2", "scores": {"xquad_es": 0.5}, "EA": None, "MA": 0.5, "overall": None}
    change = {"from": "base", "to": "phase2", "tasks": {"xquad_es": interval}}
    answered = {"es": {"right": 0.9}, "pt": {"right": None}}
    table = {
        "groups": [], "stages": [], "changes": [], "kept": {"merged": {"share": 0.9}},
        "abilities": {
            "tables": [{"tasks": [task], "stages": [scored], "changes": [change]}],
            "fidelity": [{"stage": "base", "task": "fidelity", "languages": answered}],
        },
    }  # fmt: skip
    assert [tuple(row.values()) for row in tidy_rows(table, "plain", 1)] == [
        ("plain", 1, "merged", None, None, "kept", 0.9, None, None),
        ("plain", 1, "phase2", "es", "xquad_es", "exact_match", 0.5, None, None),
        ("plain", 1, "phase2", None, None, "MA", 0.5, None, None),
        ("plain", 1, "phase2", "es", "xquad_es", "exact_match since base", 0.1, 0.0, 0.2),
        ("plain", 1, "base", "es", "fidelity", "answers in their language", 0.9, None, None),
    ]


def test_a_chat_in_python(place, tmp_path):
    chat = package.chat("tiny", stage="phase1", max_new_tokens=4, system="a red cat", temperature=0.5)
    (first,) = chat.answer(CAT).values()
    with pytest.raises(InputError, match="cannot be written"):
        chat.save(tmp_path / "none" / "there.jsonl")
    chat.use("base")
    chat.both()
    assert chat.stages == ["base", "phase2"]
    assert [*chat.answer(CAT)] == ["base", "phase2"]
    assert [*chat.answers(CAT, stopped=lambda: True)] == []
    chat.save(tmp_path / "saved.jsonl")
    base = json.loads((tmp_path / "saved.jsonl").read_text().splitlines()[0])["messages"]
    assert [m["content"] for m in base[:3]] == [CAT, first.text, CAT]
    with pytest.raises(InputError, match="the prompt is empty"):
        chat.answer(" ")
    with pytest.raises(InputError, match="not valid UTF-8 text"):
        chat.answer("\ud800")


def test_the_notebook_runs_in_a_kernel(made, monkeypatch):
    """What it shows of a run, a table, answers and a chat is their HTML or their repr."""
    pytest.importorskip("ipykernel")
    client = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].source.startswith("RECIPE, RUNS = ")
    code[0].source = f"RECIPE, RUNS = {str(made / 'recipe.yaml')!r}, {str(made / 'runs')!r}"
    client.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(made)}}).execute()
    assert [cell.outputs[-1].output_type for cell in code[1:]] == ["execute_result"] * 4  # progress comes before it
    run, frame, answers, chat = (cell.outputs[-1].data for cell in code[1:])
    assert "<svg" not in run["text/html"]
    assert "data:image/svg+xml" in run["text/html"]
    assert "phase2 es" in frame["text/html"]
    assert re.search(r"<th[^>]*>phase1: \d+ token", answers["text/html"])
    assert "Answer(text=" in chat["text/plain"]
