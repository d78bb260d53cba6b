"""What the documents say: commands parse, links lead somewhere, the table of recipe keys is the schema's."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from qcft.cli import app
from qcft.recipe.keys import MEANINGS, keys, with_table

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "recipes/README.md", "tests/README.md", "qcft/README.md"]
COMMANDS = typer.main.get_command(app).commands


def text_of(document):
    return (ROOT / document).read_text(encoding="utf-8")


def shell_lines(document):
    """Lines of shell blocks that call qcft, each `&&` part by itself, without comment: their words after `qcft`."""
    for block in re.findall(r"```sh\n(.*?)```", text_of(document), re.DOTALL):
        for line in block.splitlines():
            for part in re.split(r"\s+&&\s+", line):
                words = shlex.split(part, comments=True)
                if words[:1] == ["qcft"]:
                    yield words[1:]


def command_lines(document):
    """The same without redirections."""
    for words in shell_lines(document):
        yield words[: next((i for i, word in enumerate(words) if word in {"<", ">"}), len(words))]


LINES = [(document, words) for document in DOCUMENTS for words in command_lines(document)]


@pytest.mark.parametrize(("document", "words"), LINES, ids=[" ".join(words) for _, words in LINES])
def test_every_command_parses(document, words):
    assert COMMANDS[words[0]].make_context(words[0], words[1:]).params is not None


def test_commands_are_found():
    assert len(LINES) > 20
    assert {words[0] for _, words in LINES} >= {"run", "phase1", "phase2", "ablate", "check", "dial", "compare"}


@pytest.mark.parametrize("name", ["quickstart", "beyond", "quick-ablation-cpu"])
def test_what_the_documents_name_is_there(name, qcft):
    code, out, _ = qcft("recipes", "--show", name)
    assert code == 0
    assert f"name: {name}" in out


def test_every_command_is_in_the_table_of_commands():
    rows = [line for line in text_of("recipes/README.md").splitlines() if line.startswith("| `qcft ")]
    assert set(COMMANDS) == {name for row in rows for name in re.findall(r"`qcft ([a-z0-9]+)", row.split(" | ")[0])}


def anchors(text):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    links = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", text_of(document))
    for link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_readme_is_short():
    assert len(text_of("README.md").splitlines()) <= 200


def test_every_key_has_a_meaning_and_the_table_is_current():
    assert {key for key, _, _ in keys()} == set(MEANINGS)
    text = text_of("recipes/README.md")
    assert with_table(text) == text, "run `python -m qcft.recipe.keys`"


def test_every_shipped_recipe_is_listed():
    listed = text_of("recipes/README.md")
    assert [path.stem for path in (ROOT / "recipes").glob("*.yaml") if f"`{path.stem}`" not in listed] == []
