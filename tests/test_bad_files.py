"""Files that no person writes by hand and some machine made: each refused in one line, and none hangs."""

import gzip
import json
import os
import shutil
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from qcft import InputError
from qcft.data.sources import read_records
from qcft.data.streams import BLANKS
from qcft.recipe import Source

from .helpers.bad_input import check_refused
from .helpers.tiny import write_rows

GOOD = [{"instruction": f"what color is {i}", "output": "red"} for i in range(40)]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def setting(text):
    return ["run", "recipe.yaml", "--set", text]


def data(name, **more):
    return setting(f"phase1.data=[{json.dumps({'path': name, 'lang': 'en', **more})}]")


CASES = {
    # recipes
    **{f"{what} as the recipe": (["run", name], f"is {what}, not a recipe") for what, name in {
        "a named pipe": "pipe", "a socket": "socket", "a device": "/dev/zero",
        "a link that leads in a circle": "circle.jsonl", "a link that leads nowhere": "nowhere.jsonl",
    }.items()},
    "a recipe of gigabytes": (["run", "large.yaml"], "a recipe has at most"),
    "merges of merges": (["run", "merges.yaml"], "more than 10,000 keys"),
    "a merge of no mapping": (["run", "merge.yaml"], "expected a mapping"),
    "a key twice in a value": (setting("phase1.train={lr: 1, lr: 2}"), "the key 'lr' is given twice"),
    "a digit that is none": (setting("phase1.data.²=1"), "'²' is not an entry of a list"),
    "a digit too many": (setting(f"phase1.data.{'1' * 5000}=1"), "is not an entry of a list"),
    "a name that is a number": (setting("name=123"), "name: 123 should be a valid string"),
    "a language that is a truth": (setting("phase1.data.0.lang=no"), "lang: False should be a valid string"),
    "half a pair": (setting('phase1.system="\\ude00\\ud83d"'), "half a character"),
    # data
    **{f"{what} as data": (data(name), f"is {what}") for what, name in {
        "a named pipe": "pipe", "a socket": "socket", "a device": "/dev/zero",
        "a link that leads in a circle": "circle.jsonl", "a link that leads nowhere": "nowhere.jsonl",
    }.items()},
    "a folder of pipes": (data("pipes"), "holds no data files"),
    **{f"the data {name}": (data(name), says) for name, says in {
        "bomb.jsonl.gz": "unpacks to over 256 MB",
        "bomb.parquet": "unpacks to over 256 MB",
        "blanks.jsonl": "characters of blank lines",
        "blanks.json": "characters of blank lines",
        "latin.parquet": "Invalid UTF8 sequence",
        "latin.arrow": "Invalid UTF8 sequence",
        "far.arrow": "not readable as Arrow",
        "cut.arrow": "not readable as Arrow",
        "twice.parquet": "two columns are named 'output'",
        "fields.parquet": "two columns are named 'x'",
        "year.parquet": "not readable as parquet",
        "saved-stateless": "was not written by save_to_disk",
        "saved-cut": "was not written by save_to_disk",
        "saved-empty": "it lacks data-00000-of-00001.arrow",
        "saved-outside": "is not in the folder",
        "saved-absolute": "is not in the folder",
        "saved-odd": "was not written by save_to_disk",
        "saved-splits": "is not in the folder",
    }.items()},
    "a saved split that is another folder": (data("saved-splits", split="../saved"), "is not in the folder"),
    # models and adapters
    **{f"{what} as the model": (setting(f"model.name={name}"), f"is {what}") for what, name in {
        "a named pipe": "pipe", "a socket": "socket", "a device": "/dev/zero",
    }.items()},
    "a model with a pipe in it": (setting("model.name=piped"), "is a named pipe"),
    "a pipe as the adapter": (setting("phase1={adapter: pipe}"), "there is no folder"),
    "an adapter of pipes": (setting("phase1={adapter: piped-adapter}"), "has no adapter_config.json"),
    # templates
    **{f"a template with {what}": (setting(f"model.name=templated-{name}"), says) for what, name, says in [
        ("an empty reason", "silent", "refuses it: TemplateError"),
        ("loops in loops", "endless", "exceeds the limits"),
        ("a wide number", "wide", "exceeds the limits"),
        ("a number for a template", "number", "is not text"),
        ("macros in macros", "deep", "recursion"),
    ]},
}  # fmt: skip
TEMPLATES = {
    "silent": "{{ raise_exception('') }}",
    "endless": ENDLESS,
    "wide": "{{ '%0999999999d' % 1 }}",
    "deep": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model):
    """A folder with all that can be wrong, made once; nothing writes into it."""
    place = tmp_path_factory.mktemp("bad")
    write_rows(place / "good.jsonl", GOOD)
    os.mkfifo(place / "pipe")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(place / "socket"))
    (place / "circle.jsonl").symlink_to("circle.jsonl")
    (place / "nowhere.jsonl").symlink_to("nowhere")
    (place / "pipes").mkdir()
    os.mkfifo(place / "pipes" / "a.jsonl")
    with (place / "large.yaml").open("wb") as stream:
        stream.truncate(5 << 30)
    (place / "merge.yaml").write_text("<<: 1\n")
    levels = (f"x{i}: &x{i} {{<<: *x{i - 1}, {', '.join(f'k{i}y{j}: 1' for j in range(999))}}}\n" for i in range(1, 12))
    (place / "merges.yaml").write_text("x0: &x0 {a: 1}\n" + "".join(levels))
    make_data(place)
    make_saved(place)
    os.mkfifo(shutil.copytree(tiny_model, place / "piped") / "vocab.txt")
    (place / "piped-adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        os.mkfifo(place / "piped-adapter" / name)
    for name, template in TEMPLATES.items():
        (shutil.copytree(tiny_model, place / f"templated-{name}") / "chat_template.jinja").write_text(template)
    number = shutil.copytree(tiny_model, place / "templated-number")
    (number / "chat_template.jinja").unlink()
    config = json.loads((number / "tokenizer_config.json").read_text())
    (number / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": 7}))
    return place


def make_data(place):
    with gzip.open(place / "bomb.jsonl.gz", "wb", compresslevel=1) as packed:
        for _ in range(300):
            packed.write(b"a" * 1_000_000)
    many = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), ["a" * 20_000])
    pq.write_table(pa.table({"instruction": many, "output": many}), place / "bomb.parquet")
    for name, start in {"jsonl": b"", "json": b"{}\n"}.items():
        (place / f"blanks.{name}").write_bytes(start + (b" " * 999 + b"\n") * (BLANKS // 1000 + 9))
    offsets = pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0")
    latin = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"ok\xff\xfe")])
    table = pa.table({"instruction": latin, "output": ["a", "b"]})
    pq.write_table(table, place / "latin.parquet")
    with pa.OSFile(str(place / "latin.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    whole = (place / "latin.arrow").read_bytes()
    (place / "far.arrow").write_bytes(whole.replace(offsets.to_pybytes(), b"\0\0\0\0\2\0\0\0\xff\xff\xff\x7f"))
    (place / "cut.arrow").write_bytes(whole[:-100])
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pq.write_table(pa.Table.from_arrays(columns, ["instruction", "output", "output"]), place / "twice.parquet")
    fields = pa.StructArray.from_arrays(columns[:2], ["x", "x"])
    pq.write_table(pa.table({"instruction": ["a"], "output": ["b"], "more": fields}), place / "fields.parquet")
    years = pa.array([2**61], pa.timestamp("us"))
    pq.write_table(pa.table({"instruction": ["a"], "output": ["b"], "when": years}), place / "year.parquet")


def make_saved(place):
    from datasets import Dataset, DatasetDict

    Dataset.from_list(GOOD).save_to_disk(place / "saved")
    DatasetDict(train=Dataset.from_list(GOOD)).save_to_disk(place / "saved-splits")
    (place / "saved-splits" / "dataset_dict.json").write_text('{"splits": ["train", "../saved"]}')

    def copy(name, **state):
        folder = shutil.copytree(place / "saved", place / f"saved-{name}")
        old = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps({**old, **state}))
        return folder / "data-00000-of-00001.arrow"

    (copy("stateless").parent / "state.json").write_text("{}")
    (copy("cut")).write_bytes((place / "saved" / "data-00000-of-00001.arrow").read_bytes()[:-200])
    copy("empty").unlink()
    copy("outside", _data_files=[{"filename": "../saved/data-00000-of-00001.arrow"}])
    copy("absolute", _data_files=[{"filename": "/etc/passwd"}])
    copy("odd", _data_files=5)


@pytest.fixture
def place(files, raw_recipe, monkeypatch, tmp_path):
    """The files, and a folder of one's own with the recipe beside links to them."""
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    for file in files.iterdir():
        (tmp_path / file.name).symlink_to(file)
    raw = {**raw_recipe, "phases": raw_recipe["phases"][:1]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.replace(" ", "-")[:60])
def test_bad_files_give_two_lines_and_nothing_is_written(qcft, place, case):
    check_refused(qcft, place, *CASES[case])


def test_a_limit_is_reported_with_what_to_do(files):
    with pytest.raises(InputError) as error:
        list(read_records(Source(path=str(files / "bomb.jsonl.gz"))))
    assert "of 1." in error.value.message
    assert "gzip -d" in error.value.hint


def test_a_well_compressed_file_is_read(tmp_path):
    """A repetitive file is compressed to a hundredth, and is not a bomb."""
    text = "".join(json.dumps(row) + "\n" for row in GOOD * 500)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    table = pa.table({key: pa.array([row[key] for row in GOOD * 500]).dictionary_encode() for key in GOOD[0]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    for name in ("a.jsonl.gz", "a.parquet", "a.arrow"):
        assert list(read_records(Source(path=str(tmp_path / name)))) == GOOD * 500


def test_blank_lines_between_rows_are_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join("\n" * 5000 + json.dumps(row) + "\n" for row in GOOD))
    assert list(read_records(Source(path=str(tmp_path / "a.jsonl")))) == GOOD


def test_endless_blank_lines_in_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr("qcft.data.streams.BLANKS", 1000)
    (tmp_path / "a.csv").write_text("instruction,output\na,b\n" + "\n" * 1001)
    with pytest.raises(InputError, match="before line 1003"):
        list(read_records(Source(path=str(tmp_path / "a.csv"))))


def test_circular_links_within_a_folder_add_no_rows(tmp_path):
    write_rows(tmp_path / "data" / "a.jsonl", GOOD)
    (tmp_path / "data" / "here").symlink_to(".")
    (tmp_path / "data" / "up").symlink_to("..")
    (tmp_path / "data" / "b.jsonl").symlink_to("b.jsonl")
    os.mkfifo(tmp_path / "data" / "c.jsonl")
    assert list(read_records(Source(path=str(tmp_path / "data")))) == GOOD


def test_a_saved_folder_is_read_by_its_splits(files):
    for name, split in (("saved", "train"), ("saved-splits", "train")):
        folder = files / name
        if name == "saved-splits":
            folder = Path(shutil.copytree(folder, files / "whole"))
            (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
        assert list(read_records(Source(path=str(folder), split=split))) == GOOD
        with pytest.raises(InputError, match="no split 'test'"):
            list(read_records(Source(path=str(folder), split="test")))
