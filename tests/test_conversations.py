"""Conversations in every shape people have them: one row of plain turns each, or a row dropped for a named reason."""

import json

import pytest

from qcft.data.formats import Unusable, to_row
from qcft.data.load import load_source, read_pool
from qcft.events import Watch
from qcft.recipe import HeldOut, Source

from .helpers.tiny import write_rows

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
TURNS = [("user", "q"), ("assistant", "a")]


def shown(*parts):
    return {"role": "user", "content": [*parts]}


def said(record, format="messages"):
    return [(m.role, m.content) for m in to_row(record, format).messages]


@pytest.mark.parametrize(
    "messages",
    [
        [USER, ANSWER],
        json.dumps([USER, ANSWER]),
        str([USER, ANSWER]),  # as pandas writes a list to CSV
        json.dumps([USER, ANSWER]).encode(),
        [json.dumps(USER), json.dumps(ANSWER)],
        [[*USER.items()], [*ANSWER.items()]],  # Arrow's maps
        [
            {"from": "human", "value": "q", "role": None, "content": None},
            {"from": "gpt", "value": "a", "role": None, "content": None},
        ],
        [
            {"from": None, "value": None, **USER},
            {"from": None, "value": None, **ANSWER},
        ],
        [{**USER, "tool_calls": None}, {**ANSWER, "tool_calls": [], "function_call": None}],
        [
            {"role": "user", "content": [{"type": "text", "text": "q", "image_url": None}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
        ],
    ],
)
def test_shapes_of_messages(messages):
    assert said({"messages": messages}) == TURNS
    assert said({"conversations": messages}, "sharegpt") == TURNS


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"function": {"name": "clock"}}]}]}, "with a tool call"),
        ({"messages": [USER, {"role": "tool", "content": "12"}, ANSWER]}, "with a tool call"),
        *(
            ({"messages": [USER, {"from": role, "value": "x"}, ANSWER]}, "with a tool call")
            for role in ("function_call", "observation", "function", "tool_response")
        ),
        ({"messages": [shown({"type": "image_url", "image_url": {}}, {"type": "text", "text": "q"}), ANSWER]},
         "with an image"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "with an image"),
        ({"messages": [USER, ANSWER], "image": {"path": "a.png"}}, "with an image"),
        ({"messages": [shown({"type": "input_audio"}), ANSWER]}, "with audio"),
        ({"messages": [shown({"type": "file", "file": {}}), ANSWER]}, "with a part of type 'file'"),
        ({"messages": "no JSON"}, "no conversation"),
        ({"messages": "[1, 2]"}, "no conversation"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'"),
    ],
)  # fmt: skip
def test_what_a_text_model_cannot_be_taught_is_dropped_by_reason(record, reason):
    with pytest.raises(Unusable) as error:
        to_row(record, "messages")
    assert str(error.value) == reason


def test_dropped_rows_are_counted_and_the_rest_trains(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"q{i}"}, ANSWER], "images": ["x"] * (i < 3)} for i in range(30)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    found = load_source(Source(path=str(path)), HeldOut(share=0.3, rows=100), Watch())
    assert found.left_out == {"with an image": 3}
    assert len(found.rows) + len(found.held_out) == 27


def test_an_answer_that_is_json_stays_an_answer():
    answer = '[{"from": "a", "role": "x"}]'
    assert said({"prompt": "q", "completion": answer}, "prompt-completion") == [("user", "q"), ("assistant", answer)]
    record = {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER]), "system": "s"}
    assert said(record, "prompt-completion") == [("system", "s"), *TURNS]
    assert said({"instruction": answer, "output": answer}, "alpaca") == [("user", answer), ("assistant", answer)]


@pytest.mark.parametrize(
    "history",
    [
        [["first", "one"], ["second", "two"]],
        json.dumps([["first", "one"], ["second", "two"]]),
        [{"role": role, "content": text} for role, text in zip(
            ("user", "assistant") * 2, ("first", "one", "second", "two"), strict=True)],
    ],
)  # fmt: skip
def test_history_is_kept_as_earlier_turns(history):
    earlier = [("user", "first"), ("assistant", "one"), ("user", "second"), ("assistant", "two")]
    record = {"instruction": "q", "output": "a", "system": "s", "history": history}
    assert said(record, "alpaca") == [("system", "s"), *earlier, *TURNS]
    for nothing in (None, [], "", "[]"):
        assert said({"instruction": "q", "output": "a", "history": nothing}, "alpaca") == TURNS


@pytest.mark.parametrize(
    ("column", "turn", "system"),
    [
        ("be brief", "be brief", "be brief"),
        ("be brief", "be kind", "be brief\n\nbe kind"),
        ("be brief", None, "be brief"),
        ("", "be kind", "be kind"),
    ],
)
def test_a_system_column_and_a_system_turn_are_one(column, turn, system):
    first = [] if turn is None else [{"role": "system", "content": turn}]
    assert said({"system": column, "messages": [*first, USER, ANSWER]}) == [("system", system), *TURNS]


@pytest.mark.parametrize(
    ("given", "text"),
    [(15, "15"), (15.0, "15"), ("15", "15"), ("15.0", "15"), (-3.0, "-3"), (1.5, "1.5"), ("a1", "a1"),
     ("1.0.0", "1.0.0"), ("", None), (None, None), (float("nan"), None)],
)  # fmt: skip
def test_ids_that_pandas_made_floats(given, text):
    assert to_row({"id": given, "instruction": "q", "output": "a"}, "alpaca").id == text


def test_ids_of_two_files_are_parallel(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"id": i, "instruction": f"q{i}", "output": "a"} for i in range(40)]
    floats = [{**row, "id": float(row["id"]) if row["id"] != 7 else None} for row in rows]
    parquet.write_table(pa.Table.from_pylist(floats), tmp_path / "en.parquet")
    write_rows(tmp_path / "es.jsonl", rows)
    held = HeldOut(share=0.4, rows=100)
    en, es = (load_source(Source(path=str(tmp_path / name)), held, Watch()) for name in ("en.parquet", "es.jsonl"))
    assert {row.id for row in en.held_out} - {None} == {row.id for row in es.held_out} - {"7"} != set()


def test_cells_of_bytes(tmp_path):
    assert said({"instruction": b"q", "output": "señor".encode()}, "alpaca") == [("user", "q"), ("assistant", "señor")]
    with pytest.raises(Unusable, match="no text"):
        to_row({"instruction": "q", "output": b"\xff\xfe"}, "alpaca")


def test_pairs_of_half_characters_are_one(tmp_path):
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "PAIR"}]
    pair = "\\ud83d\\ude00"
    twice = pair.replace("\\", "\\\\")
    lines = [
        json.dumps({"messages": said}),
        json.dumps({"messages": json.dumps(said)}),
        json.dumps({"messages": str(said)}),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text(
        "\n".join([lines[0].replace("PAIR", pair), *(line.replace("PAIR", twice) for line in lines[1:])] * 9)
    )
    found = read_pool(Source(path=str(path)), True, Watch())
    assert not found.left_out
    assert {row.messages[1].content for row in found.rows} == {"😀"}
