"""Plain English: prose and names, in the package and in the tests, without the words that were replaced by the field's
own."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# In a folder, all Python files, Markdown documents and recipes; but for this file, which lists the phrases.
PLACES = ("README.md", "qcft", "recipes", "tests")
SUFFIXES = {".py", ".md", ".yaml", ".yml"}

# Each retired phrase, and what to write instead. A space stands for any white space, a line break included.
RETIRED = {
    r"\b(?:go|goes|going|gone|went) on\b": "resume, continue",
    r"\b(?:tell|tells|telling|told)\b": "report, print, show, say; distinguish (for: tell apart)",
    r"\breckon(?:s|ed|ing)?\b": "estimate",
    r"\bmend(?:s|ed|ing)?\b": "fix",
    r"\banew\b": "again; rebuild, rerun",
    r"\bdone before\b": "cached, reused",
    r"\bblot(?:s|ted|ting)? out\b": "redact",
    r"\bas (?:it|they) came\b": "unmodified",
    r"\bwhat \w+ (?:make|makes|made) of\b": "output",
    r"\b(?:leave|leaves|leaving|left)(?: \S+){0,3} out\b": "drop, truncate; skip; omit (a flag)",
    r"\brest(?:s|ed|ing)? on\b": "depend on",
    r"\btheir constants\b": "quantization constants",
    r"\b(?:hear|hears|hearing|heard)\b": "receive",
    r"\b(?:share|shares|shared|deal|deals|dealt)(?: \w+)? out\b": "shard, distribute",
    r"\b(?:take|takes|taking|taken|took) in\b": "import",
    r"\bsettl(?:e|es|ed|ing)\b": "warm up",
    r"(?<!there\s)\b(?:is|are|was|were) no (?!longer\b)": "is not a",
    r"\b(?:come|comes|came|coming) to\b": "is, results in",
    r"\balike\b": "similar",
    r"\ba wrong\b(?! \w)|\bthe wrong\b(?! \w)": "error",
}
PATTERN = re.compile("|".join(f"(?:{phrase})" for phrase in RETIRED).replace(" ", r"\s+"), re.IGNORECASE)

# Keys and file names that are in users' files and scripts keep their names: in prose they are in backticks.
KEPT = ("`left_out.jsonl`", "`long_rows: cut`", "`told`", "`mend`")


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """The texts of a file that a person reads, with their first lines."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        tree = ast.parse(source)
        yield from strings(tree)
        yield from names(tree)
        yield from comments(source)
    elif path.suffix == ".md":
        yield 1, source
    else:
        yield 1, "\n".join(line.partition("#")[2] for line in source.splitlines())


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Docstrings, and other strings with a space in them; an f-string as one text, with `{}` for its values."""
    parts = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts |= {id(part) for part in node.values}
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            text = node.value
        else:
            continue
        if " " in text:
            yield node.lineno, text


def names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Names of functions and classes, with a space for each underscore."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name.replace("_", " ")


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments, those on lines that follow each other as one text."""
    tokens = [one for one in tokenize.generate_tokens(io.StringIO(source).readline) if one.type == tokenize.COMMENT]
    block: list[str] = []
    for one, after in pairwise([*tokens, None]):
        block.append(one.string.lstrip("#"))
        if after is None or after.start != (one.start[0] + 1, one.start[1]):
            yield one.start[0] - len(block) + 1, "\n".join(block)
            block = []


def retired(path: Path) -> list[str]:
    """`file:line: phrase` for each retired phrase in a file's prose."""
    found = []
    for first, text in prose(path):
        for name in KEPT:
            text = text.replace(name, "_" * len(name))
        for match in PATTERN.finditer(text):
            line = first + text.count("\n", 0, match.start())
            found.append(f"{path.relative_to(ROOT)}:{line}: {' '.join(match[0].split())!r}")
    return found


def files_of(name: str) -> list[Path]:
    place = ROOT / name
    found = [place, *place.rglob("*")]
    return sorted(p for p in found if p.suffix in SUFFIXES and p.is_file() and p != Path(__file__))


@pytest.mark.parametrize("place", PLACES)
def test_no_retired_words(place):
    files = files_of(place)
    assert files
    found = [one for path in files for one in retired(path)]
    assert not found, "\n".join(["write plain English (the table RETIRED has other words):", *found])


def test_what_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "code.py").write_text(
        '"""Rows are left\n    out."""\n'
        "told = 'mend'\n"  # a name, and a string without a space
        "# It goes\n"
        "# on; there is no end. `told`, `left_out.jsonl`\n"
        "text = f'the {told} is no\\n' 'number'\n"
        "# anew\n"
        "class Parts:\n"
        "    def _taken_in(left_out): return None\n"  # of a name, but not of an argument
    )
    (tmp_path / "notes.md").write_text("# Notes\n\nWhat it rests\non.\n")
    (tmp_path / "recipe.yaml").write_text("data: left out # what is heard\n")
    found = [one for path in sorted(tmp_path.iterdir()) for one in retired(path)]
    assert found == [
        "code.py:1: 'left out'",
        "code.py:6: 'is no'",
        "code.py:9: 'taken in'",
        "code.py:4: 'goes on'",
        "code.py:7: 'anew'",
        "notes.md:3: 'rests on'",
        "recipe.yaml:1: 'heard'",
    ]
