"""Which columns hold what: the recipe's own names, the usual other names in any case, and what is left unused."""

import json

import pytest

from qcft import InputError
from qcft.data.columns import Columns
from qcft.data.instructions import instructions
from qcft.data.load import load_source, read_pool
from qcft.events import Watch
from qcft.recipe import HeldOut, Source, recipe_from

from .helpers.tiny import write_rows

HALF = HeldOut(share=0.5, rows=100)


def load(folder, records, events=None, **keys):
    path = write_rows(folder / "a.jsonl", records)
    watch = Watch() if events is None else Watch(events.append)
    return load_source(Source(path=str(path), **keys), HALF, watch)


def turns(found):
    return {tuple((m.role, m.content) for m in row.messages) for row in found.rows + found.held_out}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("question", "answer"), ("instruction", "response"), ("prompt", "response"), ("query", "response"),
        ("text", "target"), ("Question", "ANSWER"), ("Instruction", "Output"), ("Prompt", "Completion"),
        ("input", "output"), ("instruction ", "output"),
    ],
)  # fmt: skip
def test_the_usual_names(tmp_path, question, answer):
    found = load(tmp_path, [{question: f"q{i}", answer: f"a{i}"} for i in range(20)])
    assert turns(found) == {(("user", f"q{i}"), ("assistant", f"a{i}")) for i in range(20)}


def test_the_usual_names_of_further_columns(tmp_path):
    records = [{"ID": i, "system_prompt": "s", "Context": "c", "question": f"q{i}", "answer": "a"} for i in range(20)]
    found = load(tmp_path, records)
    assert turns(found) == {(("system", "s"), ("user", f"q{i}\n\nc"), ("assistant", "a")) for i in range(20)}
    assert {row.id for row in found.rows + found.held_out} == {str(i) for i in range(20)}


def test_squads_form(tmp_path):
    """Its answers are those that are accepted; a question may have none in its passage (SQuAD 2)."""
    records = [
        {"id": f"{i}", "title": "t", "context": f"c{i}", "question": f"q{i}",
         "answers": {"text": [f"a{i}", "other"] if i else [], "answer_start": [0, 3] if i else []}}
        for i in range(20)
    ]  # fmt: skip
    found = load(tmp_path, records)
    assert turns(found) == {(("user", f"q{i}\n\nc{i}"), ("assistant", f"a{i}")) for i in range(1, 20)}
    assert found.left_out == {"empty answer": 1}
    assert {row.id for row in found.rows + found.held_out} == {str(i) for i in range(1, 20)}
    pool = read_pool(Source(path=str(tmp_path / "a.jsonl")), answers=False, watch=Watch())
    assert len(pool.rows) == 20  # the prompt of a question without an answer can be replayed
    with pytest.raises(InputError, match="question, answers: no known format"):
        load(tmp_path, [{"question": f"q{i}", "answers": {"label": 1}} for i in range(20)])


def test_columns_with_the_known_names_come_first(tmp_path):
    records = [{"instruction": f"i{i}", "output": "o", "question": f"q{i}", "answer": "a"} for i in range(20)]
    assert turns(load(tmp_path, records)) == {(("user", f"i{i}"), ("assistant", "o")) for i in range(20)}
    keys = {"columns": {"instruction": "question", "output": "answer", "id": "instruction"}}
    assert turns(load(tmp_path, records, **keys)) == {(("user", f"q{i}"), ("assistant", "a")) for i in range(20)}


def test_named_columns(tmp_path):
    records = [{"n": i, "frage": f"q{i}", "antwort": "a", "frage_en": f"e{i}", "antwort_en": "b"} for i in range(20)]
    found = load(tmp_path, records, columns={"instruction": "frage", "output": "antwort", "id": "n"})
    assert turns(found) == {(("user", f"q{i}"), ("assistant", "a")) for i in range(20)}
    row = found.rows[0]
    assert row.english is not None
    assert (row.english.prompt[0].content, row.english.completion[0].content) == (f"e{row.id}", "b")
    with pytest.raises(InputError, match=r"has no column 'farge'") as error:
        load(tmp_path, records, columns={"instruction": "farge", "output": "antwort"})
    assert error.value.hint.startswith("did you mean 'frage'? it has n, frage, antwort")


def test_an_unknown_format_names_the_flag(tmp_path):
    for records in ([{"frage": "q", "antwort": "a"}], [{"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}]):
        with pytest.raises(InputError, match="no known format") as error:
            load(tmp_path, records * 20)
        assert "--columns instruction=COLUMN,output=COLUMN" in error.value.hint
        assert ", ".join(records[0]) in error.value.message


def test_what_nothing_reads_is_named(tmp_path):
    events = []
    records = [
        {"instruction": f"q{i}", "output": "a", "tools": ["clock"], "topic": "x", "empty": None} for i in range(20)
    ]
    assert len(turns(load(tmp_path, records, events))) == 20
    assert [event.text.partition(": ")[2] for event in events] == ["columns that are not used: tools, topic"]
    events.clear()
    load(tmp_path, [{"instruction": f"q{i}", "input": "", "output": "a", "id": i} for i in range(20)], events)
    assert events == []


def test_records_of_several_formats_in_one_source(tmp_path):
    """Columns of a table that joins two formats are null where a row is of the other."""
    mixed = [
        {
            "messages": None
            if i % 2
            else [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}],
            "instruction": f"q{i}" if i % 2 else None,
            "output": "a" if i % 2 else None,
        }
        for i in range(20)
    ]
    found = load(tmp_path, mixed)
    assert turns(found) == {(("user", f"q{i}"), ("assistant", "a")) for i in range(20)}
    assert found.left_out == {}


def test_pools_and_instructions_know_them_too(tmp_path):
    records = [{"id": i, "context": "c", "question": f"q{i}", "replies": {"text": ["x"]}} for i in range(5)]
    path = str(write_rows(tmp_path / "a.jsonl", records))
    prompts = read_pool(Source(path=path), answers=False, watch=Watch())
    assert [row.prompt[0].content for row in prompts.rows] == [f"q{i}\n\nc" for i in range(5)]
    assert list(instructions(Source(path=path))) == [f"q{i}\n\nc" for i in range(5)]
    assert list(instructions(Source(path=path), "question")) == [f"q{i}" for i in range(5)]
    with pytest.raises(InputError, match=r"replay: row 1 of .* has the columns id, context, question, replies"):
        read_pool(Source(path=path), answers=True, watch=Watch())


def test_a_record_without_the_columns_is_counted(tmp_path):
    found = load(tmp_path, [*({"question": f"q{i}", "answer": "a"} for i in range(20)), {"question": "q"}, {"x": 1}])
    assert found.left_out == {"empty answer": 1, "no user turn": 1}


def test_named_columns_in_a_recipe(tmp_path):
    raw = {"name": "a", "model": "m", "phases": {"phase1": [{"path": "x", "columns": {"output": "antwort"}}]}}
    assert recipe_from(raw).phases[0].data[0].columns == {"output": "antwort"}
    changed = recipe_from(raw, {"phase1.data.0.columns.instruction": "frage"})
    assert changed.phases[0].data[0].columns == {"output": "antwort", "instruction": "frage"}
    with pytest.raises(InputError, match=r"phase1\.data\.0\.columns"):
        recipe_from(raw, {"phase1.data.0.columns.anser": "antwort"})


def test_renaming_does_not_modify_the_rest():
    columns = Columns(Source(path="x"))
    record = json.loads('{"question": "q", "answer": "a", "topic": 1}')
    assert columns.read(record) == ("alpaca", {"instruction": "q", "output": "a", "topic": 1})
    assert columns.read({"instruction": "q", "output": "a"}) == ("alpaca", {"instruction": "q", "output": "a"})
