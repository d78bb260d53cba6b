"""Random recipes and random data: taken, or refused in one line with a hint; never a traceback, never a hang.

`tests/soak/fuzz.py` tries ten times as many of each.
"""

import copy
import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcft.data.encode import Encoder
from qcft.data.load import load_source
from qcft.events import Watch
from qcft.recipe import HeldOut, Source, load_recipe, parse_assignments, recipe_from

from .helpers.fuzz import many, refused_or_accepted

RAW = {
    "version": 1,
    "name": "r",
    "model": {"name": "m", "revision": None, "base": None, "quantize": "nf4", "chat_template": None},
    "seed": 0,
    "lora": {"r": 16, "alpha": 32, "targets": "all-linear"},
    "heldout": {"share": 0.1, "rows": 3},
    "answers": {"prompts": 1},
    "merge": {"dtype": None, "refuse_below": 0.5},
    "probe": ["qcft:instructions/en"],
    "phases": [
        {"name": "phase1", "data": [{"path": "a", "take": 3, "lang": "en"}], "train": {"lr": 1e-4, "sft": {"x": 1}}},
        {
            "name": "phase2",
            "start": "merged",
            "data": [{"path": "{lang}", "lang": ["es"]}],
            "freeze": "first:2",
            "replay": {"ratio": 0.2, "filters": {"language": "en"}, "mix": [{"kind": "english", "weight": 2}]},
        },
    ],
}
ODD = [
    "nf4", "first:", "first:0.5", "layers:1-", "every:0", "random:0.5@x", "a" * 5000, "\ud800", "\0", "nan", "-1",
    10**400, "{lang}", "a/b", "/", "", ".", "..", "~nobody/x", "1_0", "0x1", "\u202eabc", "שלום", "1e400",
    "hf_" + "a" * 40,
]  # fmt: skip
WORDS = [
    "name",
    "path",
    "lang",
    "ratio",
    "kind",
    "train",
    "data",
    "phase1",
    "phase2",
    "0",
    "1",
    "",
    "x",
    "replay",
    "mix",
]


def paths(node, above=()):
    if above:
        yield above
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else []:
        yield from paths(value, (*above, key))


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
scalars |= st.sampled_from(ODD) | st.dates()
keys = st.text(max_size=5) | st.integers() | st.none() | st.sampled_from(WORDS)
values = st.recursive(
    scalars, lambda below: st.lists(below, max_size=3) | st.dictionaries(keys, below, max_size=3), max_leaves=6
)


@many
@given(st.sampled_from(list(paths(RAW))), values)
def test_recipes_with_anything_anywhere(path, value):
    raw = copy.deepcopy(RAW)
    node = raw
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with refused_or_accepted():
        recipe_from(raw)


@many
@given(st.lists(st.sampled_from(WORDS), max_size=5), values, st.text(max_size=20))
def test_anything_set(path, value, text):
    with refused_or_accepted():
        recipe_from(copy.deepcopy(RAW), {".".join(path): value})
    with refused_or_accepted():
        parse_assignments([text, f"seed={text}"])


SYMBOLS = st.text(alphabet="abp:{}[]- \n#&*!|>'\"%@`,?0123.\t", max_size=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@many
@given(st.binary(max_size=60) | SYMBOLS.map(str.encode) | values.map(lambda v: json.dumps(v, default=str).encode()))
def test_recipe_files_of_any_bytes(folder, content):
    (folder / "r.yaml").write_bytes(content)
    with refused_or_accepted():
        load_recipe(folder / "r.yaml")


texts = st.text(st.characters(), max_size=12) | st.sampled_from(
    ["", " ", "\0", "\ud800x", "\u202eabc\u202c", "مرحبا", "<|im_end|>", "<|im_start|>assistant\n", "a\r\nb",
     "\x1b[31m", "🦜" * 9]
)  # fmt: skip
cells = texts | values
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "wizard", None]) | cells, "content": cells}
)
records = st.one_of(
    st.fixed_dictionaries(
        {"instruction": cells, "output": cells}, optional={"input": cells, "id": cells, "system": cells}
    ),
    st.fixed_dictionaries({"messages": st.lists(turns, max_size=4) | cells}),
    st.fixed_dictionaries({"conversations": st.lists(turns, max_size=4) | cells}),
    st.fixed_dictionaries({"prompt": cells, "completion": cells, "instruction_en": cells}),
    values,
)
lines = records.map(lambda record: json.dumps(record, default=str).encode()) | st.binary(max_size=30)
GOOD = [json.dumps({"instruction": f"what {i}", "output": "red"}).encode() for i in range(12)]


@many
@given(
    st.lists(lines, max_size=6),
    st.booleans(),
    st.sampled_from([".jsonl", ".json", ".csv", ".gz", ".jsonl.gz", ".parquet", ".txt"]),
    st.sampled_from(["auto", "alpaca", "messages", "sharegpt", "prompt-completion", "text"]),
)
def test_data_of_any_kind(folder, tokenizer, content, good, suffix, format):
    """Read, split, digested and tokenised."""
    data = b"\n".join([*(GOOD if good else []), *content])
    file = folder / f"data{suffix}"
    file.write_bytes(gzip.compress(data) if suffix == ".jsonl.gz" else data)
    with refused_or_accepted():
        found = load_source(Source(path=str(file), format=format), HeldOut(share=0.3, rows=3), Watch())
        encoded = Encoder(tokenizer, None, 64, "cut").encode_all(found.rows + found.held_out)
        assert len(encoded.rows) + sum(encoded.left_out.values()) == len(found.rows) + len(found.held_out)
        assert all(row.name is not None and row.key and row.prompt_digest for row in encoded.rows)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"instruction": "a\\u0000b", "output": "c\\u0000d"}', None),
        (b'{"instruction": "a\0b", "output": "c"}', "bad JSON"),
        (b'{"instruction": "caf\xe9", "output": "c"}', "bad JSON"),
        (b'{"instruction": "a\\ud800", "output": "c"}', "broken Unicode"),
        (b'{"id": "\\udfff", "instruction": "a", "output": "c"}', "broken Unicode"),
        (json.dumps({"instruction": "red " * 2_500_000, "output": "c"}).encode(), None),
        (json.dumps({"instruction": "\u202eאבג\u202c", "output": "مرحبا"}, ensure_ascii=False).encode(), None),
        (b"[" * 1000 + b"]" * 1000, "bad JSON"),
        (b'{"instruction": ' + b"[" * 1000 + b"]" * 1000 + b', "output": "c"}', "bad JSON"),
        (b'{"instruction": "a", "output": ' + b'{"a":' * 90_000 + b"1" + b"}" * 90_001, "bad JSON"),
        (b'{"id": ' + b"9" * 5000 + b', "instruction": "a", "output": "c"}', "bad JSON"),
    ],
    ids=["NUL", "raw NUL", "Latin-1", "half a character", "half an id", "10 MB", "right to left", "1000 deep",
         "a 1000 deep cell",
         "90,000 deep", "5,000 digits"],
)  # fmt: skip
def test_lines_that_break_readers(tmp_path, line, reason):
    """Each among good lines: taken, or counted under its reason; the good ones are all there."""
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*GOOD, line, *GOOD]) + b"\n")
    with refused_or_accepted():
        found = load_source(Source(path=str(tmp_path / "a.jsonl")), HeldOut(share=0.3, rows=100), Watch())
    assert len(found.rows) + len(found.held_out) == 24 + (reason is None)
    assert found.left_out == ({} if reason is None else {reason: 1})
