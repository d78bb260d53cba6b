"""Data files as people have them: CSV of every make, damaged CSV and JSON, folders with splits and subsets."""

import json
from pathlib import Path

import pytest

from qcft import InputError
from qcft.data.files import BadLine
from qcft.data.load import load_source
from qcft.data.sources import read_records
from qcft.events import Note, Watch
from qcft.recipe import HeldOut, Source

from .helpers.tiny import write_rows

ROWS = [{"instruction": f"Say {i}", "input": "", "output": f"It is {i}"} for i in range(12)]
HALF = HeldOut(share=0.5, rows=100)


def read(path, **keys):
    return list(read_records(Source(path=str(path), **keys)))


def refusal(path, **keys):
    with pytest.raises(InputError) as error:
        read(path, **keys)
    assert error.value.hint
    return f"{error.value.message} | {error.value.hint}"


def table(path, text):
    path.write_bytes(text.encode())
    return path


def lines(delimiter, end="\n"):
    rows = [delimiter.join(row.values()) for row in ROWS]
    return end.join([delimiter.join(ROWS[0]), *rows]) + end


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain.csv", lines(",")),
        ("excel.csv", lines(";")),
        ("tabs.csv", lines("\t")),
        ("tabs.tsv", lines("\t")),
        ("windows.csv", lines(",", "\r\n")),
        ("bom.csv", "\ufeff" + lines(";")),
        ("named.csv", "sep=|\n" + lines("|")),
        ("blank.csv", lines(",") + "\n\n"),
        ("spaces.csv", lines(",").replace("instruction,input", "instruction, input")),
    ],
)
def test_csv_of_every_make(tmp_path, name, text):
    assert read(table(tmp_path / name, text)) == ROWS


def test_quotes_and_lines_within_a_field(tmp_path):
    file = table(tmp_path / "a.csv", 'instruction,output\n"Say ""a, b""","one\ntwo; three"\nSay "c",d\n')
    assert read(file) == [
        {"instruction": 'Say "a, b"', "output": "one\ntwo; three"},
        {"instruction": 'Say "c"', "output": "d"},
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (lines(",").replace("It is 3", "It is 3, of course"), "line 5: it has 4 fields where the header has 3"),
        (lines(",").replace("Say 3,,", "Say 3,"), "line 5: it has 2 fields where the header has 3"),
        (lines(",").replace("It is 3", '"It is 3'), "line 5: a quote opens here and is not closed"),
        (lines(",").replace("It is 3", '"It is" 3'), "line 5: text follows a closing quote"),
        # The quote of line 5 is closed in line 8 and a record is lost: what follows that quote gives it away.
        (lines(",").replace("It is 3", '"It is 3').replace("It is 6", 'It is "6"'), "line 5: text follows"),
        ("sep=;\n" + lines(";").replace("It is 3", "It is; 3"), "line 6: it has 4 fields"),
        (lines(",").replace("instruction,input", "output,input"), "two columns are named 'output'"),
    ],
)
def test_damaged_csv_is_refused_with_its_line(tmp_path, text, says):
    assert says in refusal(table(tmp_path / "a.csv", text))


def test_the_line_of_damage_counts_lines_within_fields(tmp_path):
    text = 'instruction,output\n"two\nlines","three\nmore\nlines"\nSay,it,is\n'
    assert "line 6: it has 3 fields" in refusal(table(tmp_path / "a.csv", text))


def test_lines_that_are_not_json_are_named(tmp_path):
    text = [json.dumps(row) for row in ROWS]
    (tmp_path / "few.jsonl").write_text("\n".join([*text[:4], text[4] + ",", "", *text[5:]]))
    events = []
    found = load_source(Source(path=str(tmp_path / "few.jsonl")), HALF, Watch(events.append))
    assert found.left_out == {"bad JSON": 1}
    assert any("1 of 12 rows are not JSON objects" in e.text and "line 5 (Extra data" in e.text for e in events)
    (tmp_path / "most.jsonl").write_text("".join(line + ",\n" for line in text[:-1]) + text[-1])
    with pytest.raises(InputError, match=r"11 of the 12 rows .* the first is line 1 \(Extra data, column"):
        load_source(Source(path=str(tmp_path / "most.jsonl")), HALF, Watch())
    (tmp_path / "meta.jsonl").write_text("\n".join(['{"_meta": "v1"}', *text]))
    with pytest.raises(InputError, match=r"row 1 of .*meta.jsonl' has the columns _meta: no known format"):
        load_source(Source(path=str(tmp_path / "meta.jsonl")), HALF, Watch())


def test_json_documents_and_json_lines_under_one_name(tmp_path):
    texts = [json.dumps(row) for row in ROWS]
    for name, text in {
        "lines.json": "\n".join(texts),
        "broken.json": "\n".join(["{oops", *texts]),
        "list.json": json.dumps(ROWS, indent=1),
        "object.json": json.dumps({"version": "1", "data": ROWS}),
        "named.json": json.dumps({"questions": ROWS}, indent=1),
        "splits.json": json.dumps({"test": ROWS[:1], "train": ROWS}),
    }.items():
        (tmp_path / name).write_text(text)
        assert [r for r in read(tmp_path / name) if not isinstance(r, BadLine)] == ROWS, name
    assert read(tmp_path / "splits.json", split="test") == ROWS[:1]
    assert "has no split 'dev' | it has test, train" in refusal(tmp_path / "splits.json", split="dev")
    (tmp_path / "tests.json").write_text(json.dumps({"test": ROWS}))
    assert "has no split 'train' | it has test" in refusal(tmp_path / "tests.json")
    (tmp_path / "one.json").write_text(json.dumps({"question": "a", "answer": "b"}))
    assert read(tmp_path / "one.json") == [{"question": "a", "answer": "b"}]


def test_a_file_has_one_split_and_no_subset(tmp_path):
    for name in ("a.jsonl", "a.csv"):
        file = table(tmp_path / name, lines(",") if name.endswith("csv") else json.dumps(ROWS[0]))
        assert "has no split 'test' | it has train" in refusal(file, split="test")
        assert "has no subset 'es'" in refusal(file, subset="es")


def said(records):
    return {record["instruction"].split()[0] for record in records}


def rows(word):
    return [{**row, "instruction": f"{word} {i}"} for i, row in enumerate(ROWS)]


LAYOUTS = {
    "a clone of the hub": (
        [f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")],
        {"train", "validation", "test"},
    ),
    "files by name": (["train.jsonl", "test.jsonl", "dev.csv"], {"train", "test", "validation"}),
    "folders by name": (["train/a.jsonl", "test/a.jsonl"], {"train", "test"}),
    "no split": (["es.jsonl", "pt.csv"], {"train"}),
    "hidden": ([".ipynb_checkpoints/train-checkpoint.jsonl", ".cache/x.json", "train.jsonl"], {"train"}),
    "infos": (["dataset_infos.json", "train.jsonl"], {"train"}),
    "brackets": (["[v2] a/train.jsonl", "[v2] a/test.jsonl"], {"train", "test"}),
}


def lay_out(folder, files):
    import pyarrow as pa
    from pyarrow import parquet

    for file in files:
        place = folder / file
        word = Path(file).name.split(".")[0].split("-")[0].upper()
        word = word if len(Path(file).parts) == 1 or word != "A" else Path(file).parts[0].upper()
        place.parent.mkdir(parents=True, exist_ok=True)
        if word == "DATASET_INFOS":
            place.write_text('{"default": {"description": ""}}')
        elif place.suffix == ".parquet":
            parquet.write_table(pa.Table.from_pylist(rows(word)), place)
        elif place.suffix == ".csv":
            table(place, "\n".join([",".join(ROWS[0]), *(",".join(r.values()) for r in rows(word))]))
        else:
            write_rows(place, rows(word))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_is_laid_out_as_datasets_does(tmp_path, layout):
    from datasets import load_dataset

    files, splits = LAYOUTS[layout]
    lay_out(tmp_path / "set", files)
    if layout not in {"files by name", "no split", "brackets"}:  # of two formats `datasets` takes one, silently
        theirs = load_dataset(str(tmp_path / "set"), cache_dir=str(tmp_path / "cache"))
        assert set(theirs) == splits
        for split in splits:
            assert read(tmp_path / "set", split=split) == theirs[split].to_list()
    words = {split: said(read(tmp_path / "set", split=split)) for split in splits}
    if layout == "no split":
        assert words["train"] == {"ES", "PT"}
    else:
        assert words["train"] == {"TRAIN"}
    assert words.get("test", {"TEST"}) == {"TEST"}
    assert "has no split 'tset' | it has train" in refusal(tmp_path / "set", split="tset")


def test_the_same_rows_in_two_formats_are_refused(tmp_path):
    lay_out(tmp_path / "set", ["train.jsonl", "train.parquet"])
    assert "holds both train.jsonl and train.parquet" in refusal(tmp_path / "set")


def test_files_of_no_split_are_named(tmp_path):
    lay_out(tmp_path / "set", ["train.jsonl", "test.jsonl", "more.jsonl"])
    events = []
    found = list(read_records(Source(path=str(tmp_path / "set")), Watch(events.append)))
    assert said(found) == {"TRAIN"}
    assert [type(event) for event in events] == [Note]
    assert events[0].text.endswith("belong to no split by their names: more.jsonl")


def test_subsets_are_configs_or_folders(tmp_path):
    lay_out(tmp_path / "set", ["es/train.jsonl", "pt/train.jsonl"])
    write_rows(tmp_path / "set/es/train.jsonl", rows("ES"))
    assert said(read(tmp_path / "set", subset="es")) == {"ES"}
    assert "has no subset 'fr'" in refusal(tmp_path / "set", subset="fr")
    assert refusal(tmp_path / "set", subset="fr").endswith("it has es, pt")
    card = "---\nconfigs:\n- config_name: one\n  data_files: es/train.jsonl\n- config_name: two\n  data_dir: pt\n---\n"
    (tmp_path / "set/README.md").write_text(card)
    assert said(read(tmp_path / "set", subset="one")) == {"ES"}
    assert said(read(tmp_path / "set", subset="two")) == {"TRAIN"}
    assert "has several subsets | it has one, two" in refusal(tmp_path / "set")
    assert "has no subset 'es'" in refusal(tmp_path / "set", subset="es")
    (tmp_path / "set/README.md").write_text(card.replace("es/train.jsonl", "es/tarin.jsonl"))
    assert "lacks 'es/tarin.jsonl'" in refusal(tmp_path / "set", subset="one")
    for header in ("configs: [one]", "configs: {a: b}", "configs: [{data_files: x}]", "configs: [", "- a"):
        (tmp_path / "set/README.md").write_text(f"---\n{header}\n---\n")
        assert "the header of " in refusal(tmp_path / "set")


def test_what_datasets_saved_has_its_splits(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(rows("TRAIN")), "test": Dataset.from_list(rows("TEST"))}).save_to_disk(
        tmp_path / "saved"
    )
    Dataset.from_list(rows("ALONE")).save_to_disk(tmp_path / "alone")
    assert said(read(tmp_path / "saved")) == {"TRAIN"}
    assert said(read(tmp_path / "saved", split="test")) == {"TEST"}
    assert "has no split 'dev' | it has train, test" in refusal(tmp_path / "saved", split="dev")
    assert said(read(tmp_path / "alone")) == {"ALONE"}
    assert "has no split 'test'" in refusal(tmp_path / "alone", split="test")
    assert "was written by save_to_disk and has no subset 'es' | omit subset:" in refusal(
        tmp_path / "saved", subset="es"
    )
    assert read(tmp_path / "alone" / "data-00000-of-00001.arrow") == rows("ALONE")
