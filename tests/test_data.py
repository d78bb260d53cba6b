"""Files and formats in, one conversational form out; dropped rows are counted; held-out rows."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcft import InputError
from qcft.data.formats import detect_format, to_row
from qcft.data.load import load_source
from qcft.data.rows import Message, Row
from qcft.events import Watch
from qcft.recipe import HeldOut, Source

HALF = HeldOut(share=0.5, rows=100)


def load(path, held_out=HALF, **options):
    return load_source(Source(path=str(path), **options), held_out, Watch())


def rows_of(loaded):
    return {row.messages for row in loaded.rows + loaded.held_out}


ALPACA = [{"instruction": f"Say {i}", "input": None if i % 2 else "now", "output": f"It is {i}"} for i in range(20)]


def said(row):
    return [(m.role, m.content) for m in row.messages]


@pytest.mark.parametrize(
    ("record", "format", "expected"),
    [
        ({"instruction": "a", "input": None, "output": "b"}, "alpaca", [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca", [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": "c", "output": "b"}, "alpaca", [("user", "a\n\nc"), ("assistant", "b")]),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
            "sharegpt",
            [("system", "s"), ("user", "a"), ("assistant", "b")],
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2},
            "messages",
            [("user", "a"), ("assistant", "b")] * 2,
        ),
        ({"prompt": "a", "completion": "b"}, "prompt-completion", [("user", "a"), ("assistant", "b")]),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            "prompt-completion",
            [("user", "a"), ("assistant", "b")],
        ),
    ],
)
def test_formats(record, format, expected):
    assert detect_format(set(record)) == format
    assert said(to_row(record, format)) == expected


def test_prompt_ends_before_the_first_answer_and_a_last_question_is_dropped():
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    row = to_row({"messages": [{"role": r, "content": c} for r, c in turns]}, "messages")
    assert [m.content for m in row.prompt] == ["a"]
    assert [m.content for m in row.completion] == ["b", "c", "d"]


def test_file_types_hold_the_same_rows(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    text = "".join(json.dumps(r) + "\n" for r in ALPACA)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "a.json").write_text(json.dumps(ALPACA))
    (tmp_path / "lines.json").write_text(text)
    (tmp_path / "nested.json").write_text(json.dumps({"version": 1, "data": ALPACA}))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.gz").write_bytes(gzip.compress(text.encode()))
    parquet.write_table(pa.Table.from_pylist(ALPACA), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text(
        "instruction,input,output\n" + "".join(f"{r['instruction']},{r['input'] or ''},{r['output']}\n" for r in ALPACA)
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "part.jsonl").write_text(text)
    wanted = rows_of(load(tmp_path / "a.jsonl"))
    assert len(wanted) == 20
    for name in ("a.json", "lines.json", "nested.json", "a.jsonl.gz", "a.gz", "a.parquet", "a.csv", "folder"):
        assert rows_of(load(tmp_path / name)) == wanted, name


def test_a_folder_saved_by_datasets(tmp_path):
    from datasets import Dataset

    Dataset.from_list(ALPACA).save_to_disk(tmp_path / "saved")
    assert len(rows_of(load(tmp_path / "saved"))) == 20


def test_what_cannot_train_is_counted_by_reason(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = [
        {"instruction": "q", "output": " "},
        {"instruction": "", "output": "x"},
        {"instruction": "q", "output": {"a": 1}},
    ]
    lines = [json.dumps(r) for r in [*ALPACA, *bad]] + [
        "{not json",
        "[1]",
        '{"instruction": "\xff"'.encode("latin-1").hex(),
    ]
    path.write_text("\n".join(lines))
    assert load(path).left_out == {"empty answer": 1, "no user turn": 1, "no text": 1, "bad JSON": 3}


def test_bytes_that_are_not_utf8_are_bad_json_not_a_crash(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        "".join(json.dumps(r) + "\n" for r in ALPACA).encode() + b'{"instruction": "\xff", "output": "x"}\n'
    )
    assert load(path).left_out == {"bad JSON": 1}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", '{"foo": 1}\n', "has the columns foo: no known format"),
        ("a.jsonl", '{"instruction": "a", "output": ""}\n', "none of the 1 rows"),
        ("a.jsonl", "{bad\n{bad\n", "2 of the 2 rows"),
        ("a.json", "[1, 2", "not readable as JSON"),
        ("a.doc", "hello", "has an unsupported file type"),
        ("a.parquet", "hello", "not readable as parquet"),
        ("a.gz", "\x1f\x8bxx", "cannot be read"),
    ],
)
def test_unusable_files(tmp_path, name, text, says):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=says) as error:
        load(tmp_path / name)
    assert error.value.hint


def test_missing_and_misnamed_data(tmp_path):
    with pytest.raises(InputError, match="no file"):
        load(tmp_path / "nope.jsonl")
    with pytest.raises(InputError, match="no data named 'qcft:pasages/es'") as error:
        load("qcft:pasages/es")
    assert "passages/es" in error.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no data files"):
        load(tmp_path / "empty")


def test_format_can_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({**r, "messages": None}) + "\n" for r in ALPACA))
    assert len(rows_of(load(tmp_path / "a.jsonl", format="alpaca"))) == 20
    with pytest.raises(InputError, match="none of the 20 rows"):
        load(tmp_path / "a.jsonl", format="sharegpt")


def test_take_counts_training_rows_and_reads_no_further(tmp_path, color_data):
    loaded = load(color_data / "en.jsonl", HeldOut(share=0.2, rows=3), take=10)
    assert len(loaded.rows) == 10
    assert len(loaded.held_out) == 3
    assert not {r.key for r in loaded.rows} & {r.key for r in loaded.held_out}


def test_translations_are_held_out_together_whatever_is_taken(color_data):
    share = HeldOut(share=0.3, rows=100)
    english = {r.id for r in load(color_data / "en.jsonl", share).held_out}
    spanish = {r.id for r in load(color_data / "es.jsonl", share).held_out}
    assert english == spanish
    taken = load(color_data / "pt.jsonl", share, take=5)
    assert not english & {r.id for r in taken.rows}


def test_a_held_out_prompt_never_trains_under_another_id(tmp_path):
    rows = [{"id": str(i), "instruction": "always the same", "output": f"a{i}"} for i in range(40)]
    rows += [{"id": str(i), "instruction": f"other {i}", "output": "b"} for i in range(40, 60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    loaded = load(tmp_path / "a.jsonl")
    held = {r.prompt_digest for r in loaded.held_out}
    assert held
    assert not held & {r.prompt_digest for r in loaded.rows}
    assert loaded.left_out["same prompt as a held-out row"] > 0


@given(st.text(min_size=1), st.text(min_size=1), st.floats(0.05, 0.95))
def test_holding_out_depends_on_the_key_alone(identity, text, share):
    a = Row((Message("user", text),), (Message("assistant", "x"),), identity)
    b = Row((Message("user", text + "!"),), (Message("assistant", "y"),), identity)
    assert a.is_held_out(share) == b.is_held_out(share)


def test_shipped_data_is_parallel_complete_and_extractive():
    counts = {"instructions": 150, "passages": 100}
    for name, least in counts.items():
        sets = {lang: load(f"qcft:{name}/{lang}") for lang in ("en", "es", "pt", "fr")}
        ids = {lang: {r.id for r in s.rows + s.held_out} for lang, s in sets.items()}
        assert ids["en"] == ids["es"] == ids["pt"] == ids["fr"]
        assert len(ids["en"]) >= least
        assert all(not s.left_out for s in sets.values())
        if name == "passages":
            for s in sets.values():
                assert all(r.completion[0].content in r.prompt[-1].content for r in s.rows + s.held_out)
