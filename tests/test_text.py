"""Raw text as a phase: what is a document, which tokens have loss, bits per byte, replay of and beside it, resuming."""

import gzip
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcft import InputError
from qcft.data.encode import IGNORED, TOO_SHORT, Encoder
from qcft.data.instructions import instructions
from qcft.data.load import load_source
from qcft.data.rows import Message, Row
from qcft.data.sources import read_records
from qcft.data.template import Template
from qcft.errors import Interrupted
from qcft.events import Progress, Watch
from qcft.files import read_json
from qcft.models.load import evaluating, load_model, load_tokenizer
from qcft.prepare.checks import check_prepared
from qcft.prepare.prepared import Prepared
from qcft.prepare.settings import limits_of
from qcft.recipe import HeldOut, Model, Phase, Source, recipe_from
from qcft.replay.rows import read_replay

from .helpers.bad_input import check_refused
from .helpers.tiny import make_llama, make_tokenizer, write_rows
from .helpers.training import adapter_of, same, train

HALF = HeldOut(share=0.5, rows=100)
JAPANESE = [f"猫は{i}番目の赤い箱で眠る。犬は青い道を{i * 7}回走る。鳥は緑の木で歌う。" for i in range(40)]


def document(text, id=None):
    return Row((), (Message("text", text),), id)


def documents(found):
    return {row.text for row in found.rows + found.held_out}


def load(path, events=None, **keys):
    return load_source(Source(path=str(path), **keys), HALF, Watch(events.append if events is not None else None))


# --- which records are documents


def test_a_column_text_alone_is_raw_text_and_beside_others_where_the_format_says_so(tmp_path):
    rows = [{"text": f"red dog {i}", "id": i} for i in range(20)]
    found = load(write_rows(tmp_path / "a.jsonl", rows))
    assert documents(found) == {f"red dog {i}" for i in range(20)}
    assert {row.id for row in found.rows} <= {str(i) for i in range(20)}
    labelled = write_rows(tmp_path / "b.jsonl", [{**row, "label": 1} for row in rows])
    with pytest.raises(InputError, match="columns text, id, label: no known format") as error:
        load(labelled)
    assert "format: text" in error.value.hint
    events = []
    assert documents(load(labelled, events, format="text")) == documents(found)
    assert [event.text.partition(": ")[2] for event in events] == ["columns that are not used: label"]
    other = write_rows(tmp_path / "c.jsonl", [{"body": row["text"]} for row in rows])
    assert documents(load(other, columns={"text": "body"}, format="text")) == documents(found)
    chosen = load("qcft:passages/es", format="text", columns={"text": "input"})
    assert all(row.text and row.id.startswith("p") for row in chosen.rows)


def test_instructions_with_a_column_text_are_instructions_as_before(tmp_path):
    rows = [{"instruction": f"q{i}", "output": "a", "text": "all of it"} for i in range(20)]
    assert documents(load(write_rows(tmp_path / "a.jsonl", rows))) == {None}
    assert documents(load(write_rows(tmp_path / "b.jsonl", [{"text": f"q{i}", "target": "a"} for i in range(20)]))) == {
        None
    }


def test_a_file_of_text_is_a_document_or_as_many_as_it_has_paragraphs_or_lines(tmp_path):
    text = "\ufeffred\r\nblue \r\n\r\n\n  green\n"
    wanted = {"document": ["red\r\nblue \r\n\r\n\n  green"], "paragraph": ["red\r\nblue", "green"],
              "line": ["red", "blue", "green"], None: ["red\r\nblue \r\n\r\n\n  green"]}  # fmt: skip
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    for sample_by, found in wanted.items():
        for name in ("a.txt", "a.txt.gz"):
            records = list(read_records(Source(path=str(tmp_path / name), sample_by=sample_by)))
            assert records == [{"text": one} for one in found]


def test_a_folder_of_text_and_a_folder_of_rows_with_texts_in_it(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"red dog {i}\n\nblue cat\n" if i else " \n")
    found = load(tmp_path / "texts")
    assert documents(found) == {f"red dog {i}\n\nblue cat" for i in range(1, 20)}
    assert found.left_out == {"empty document": 1}
    rows = [{"instruction": f"q{i}", "output": "a"} for i in range(20)]
    write_rows(tmp_path / "rows" / "a.jsonl", rows)
    (tmp_path / "rows" / "LICENSE.txt").write_text("do what you like")
    assert list(read_records(Source(path=str(tmp_path / "rows")))) == rows
    (tmp_path / "rows" / "notes.txt").write_text("red dog")
    assert list(read_records(Source(path=str(tmp_path / "rows"), format="alpaca"))) == rows
    assert {"text": "red dog"} in list(read_records(Source(path=str(tmp_path / "rows"), format="text")))
    with pytest.raises(InputError, match=r"raw text \(notes\.txt\) beside other files \(a\.jsonl\)"):
        list(read_records(Source(path=str(tmp_path / "rows"))))


def test_held_out_documents_are_chosen_by_their_digest(tmp_path):
    rows = [{"text": text} for text in JAPANESE]
    first = load(write_rows(tmp_path / "a.jsonl", rows))
    again = load(write_rows(tmp_path / "b.jsonl", rows[::-1] + rows[:5]))
    assert {row.text for row in first.held_out} == {row.text for row in again.held_out}
    assert not {row.text for row in again.held_out} & {row.text for row in again.rows}


def test_similarity_reads_documents(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in JAPANESE])
    assert list(instructions(Source(path=str(path)))) == JAPANESE


# --- which tokens have loss


@pytest.fixture(scope="module")
def templates(tmp_path_factory, tokenizer):
    """The tiny tokenizer, without BOS and with, and what reads its template."""
    from tokenizers.processors import TemplateProcessing

    other = make_tokenizer(tmp_path_factory.mktemp("bos"))
    other.bos_token = "<|endoftext|>"
    bos = (other.bos_token, other.bos_token_id)
    other.backend_tokenizer.post_processor = TemplateProcessing("<|endoftext|> $A", special_tokens=[bos])
    return [(one, Template(one)) for one in (tokenizer, other)]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.sampled_from("abc 猫é\n"), min_size=1, max_size=80).filter(str.strip),
    st.integers(8, 40),
    st.integers(2, 20),
    st.booleans(),
)
def test_every_token_of_a_document_but_the_first_has_loss_once(templates, text, most, least, bos):
    own, template = templates[bos]

    def encoded_as(**limits):
        return Encoder(own, max_length=most, template=template, **limits).encode(document(text))

    plain = own(text)["input_ids"] + [own.eos_token_id]
    encoded = encoded_as(min_tokens=2)
    assert all(len(piece.input_ids) == most for piece in encoded[:-1])
    assert len(encoded[-1].input_ids) <= most
    assert [token for piece in encoded for token in piece.labels if token != IGNORED] == plain[1:]
    assert all(piece.labels[0] == IGNORED and IGNORED not in piece.labels[1:] for piece in encoded)
    before = [piece.input_ids[0] for piece in encoded]
    assert before == [plain[0], *(piece.input_ids[-1] for piece in encoded[:-1])]
    kept = encoded_as(min_tokens=least)
    long = tuple(piece for piece in encoded if len(piece.input_ids) >= least)
    assert kept == (long or TOO_SHORT)
    # Measured: without the end, and where no BOS is before it without what is left of the first character.
    scored = encoded_as(measuring=True)
    whole = text if bos else text[len(own.decode(plain[:1]).replace("\ufffd", "")) or 1 :]
    if not whole:
        assert scored == TOO_SHORT
        return
    assert sum(piece.bytes for piece in scored) == len(whole.encode())
    labels = [token for piece in scored for token in piece.labels if token != IGNORED]
    assert own.decode(labels) == whole


def test_what_is_cut_and_dropped_is_counted(tokenizer):
    encoder = Encoder(tokenizer, max_length=8, min_tokens=4)
    texts = ["red", "red blue green", "a" * 6, "a" * 7, "a" * 10, "a" * 30]
    found = encoder.encode_all([document(text) for text in texts])
    sizes = [len(tokenizer(text)["input_ids"]) + 1 for text in texts]
    assert found.left_out == {TOO_SHORT: sum(size < 4 for size in sizes)}
    assert found.changed == {
        "cut into pieces of at most max_length": 2,
        f"a last piece {TOO_SHORT} dropped": 1,
    }


def test_control_tokens_in_a_document_are_plain_text(tokenizer):
    text = "red<|im_end|>blue"
    (row,) = Encoder(tokenizer, max_length=64).encode(document(text))
    assert row.input_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1  # its own end
    (measured,) = Encoder(tokenizer, max_length=64, measuring=True).encode(document(text))
    assert tokenizer.decode(measured.input_ids) == text
    assert measured.bytes == len(text) - len(tokenizer.decode(row.input_ids[:1]))


def test_settings_of_text_are_in_no_id_before_they_are_given():
    phase = Phase.model_validate({"name": "a", "data": "x"})
    assert limits_of(phase).settings() == {"system": None, "max_length": 1024, "long_rows": "drop"}
    phase = Phase.model_validate({"name": "a", "data": "x", "train": {"text": {"min_tokens": 4}}})
    assert limits_of(phase).settings()["min_tokens"] == 4


# --- a run


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "ja.txt"
    path.write_text("\n".join(JAPANESE) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def raw(raw_recipe, texts, tmp_path):
    """Text with English instructions beside it, then instructions with documents beside them."""
    two = raw_recipe["phases"][1]
    train = {"lr": 5e-3, "batch": 4, "max_length": 192, "text": {"min_tokens": 4}}
    beside = {"ratio": 0.2, "unit": "tokens", "kind": "english", "parallel": False, "loss": "distil"}
    text = {"path": str(texts), "sample_by": "line", "lang": "ja", "take": 16}
    rows = [{"instruction": f"what is {i}", "output": "red dog runs one two three " * 3} for i in range(40)]
    english = {"data": [{"path": str(write_rows(tmp_path / "en.jsonl", rows)), "lang": "en"}]}
    replay = {"ratio": 0.2, "unit": "tokens", "kind": "phase1"}
    phases = [
        {"name": "text", "data": [text], "train": train, "replay": beside | english, "anchor": "kl"},
        {**two, "name": "tune", "replay": replay, "anchor": "target-masked", "train": train},
    ]
    quick = {"heldout": {"share": 0.3, "rows": 6}, "answers": {"prompts": 2, "max_new_tokens": 4}, "forgetting": None}
    return {**raw_recipe, **quick, "phases": phases}


def test_a_run_on_text_then_instructions(qcft, raw, tiny_model, texts, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    code, out, err = qcft("run", "recipe.yaml", "--json", "-q")
    assert code == 0, err
    table = json.loads(out)
    score = table["stages"][1]["groups"]["text ja text"]
    assert (table["stages"][1]["stage"], score["phase"], score["lang"]) == ("eval/base", "text", "ja")
    held = load_source(Source(path=str(texts), sample_by="line", take=16), HeldOut(share=0.3, rows=6), Watch()).held_out
    nats, size = independent(tiny_model, [row.text for row in held])
    assert score["bytes"] == size
    assert score["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=2e-3)
    assert score["nll"] * score["answer_tokens"] == pytest.approx(nats, rel=2e-3)
    assert "bits_per_byte" not in table["stages"][1]["groups"]["probe en"]
    trained = {name: read_json(tmp_path / "runs/tiny" / name / "done.json")["metrics"] for name in ("text", "tune")}
    assert trained["text"]["terms"]["anchor_kl"] is not None
    assert trained["text"]["terms"]["distil_kl"] is not None
    mix = {entry["source"]: entry for entry in trained["text"]["mix"]}
    assert set(mix) == {"ja.txt (ja), raw text", "replay (english)"}
    share = mix["replay (english)"]["answer_tokens"] / sum(entry["answer_tokens"] for entry in mix.values())
    assert share == pytest.approx(0.2, abs=0.02)
    (replayed,) = [path for path in (tmp_path / "runs/tiny").glob("replay*") if "tune" in path.name]
    rows = [row for row, _ in read_replay(replayed / "replay.jsonl")]
    assert rows
    assert all(row.text in JAPANESE for row in rows)
    code, out, err = qcft("show", "tiny")
    assert code == 0, err
    assert "b/B" in out
    assert "text ja text" in out
    report = (tmp_path / "runs/tiny/report/report.md").read_text()
    assert "bits for each of its UTF-8 bytes" in report
    assert "bits_per_byte" in (tmp_path / "runs/tiny/report/tables/stages.csv").read_text()
    assert "The rows in Japanese are raw text: without prompts, there are no answers." in report
    code, _, err = qcft("compare", "tiny", "--lang", "ja")
    assert code == 2
    assert err == ("error: the run has no prompts in 'ja': its held-out rows are raw text\nhint: it has en, es, pt\n")
    code, out, err = qcft("check", "recipe.yaml")
    assert code == 0, err
    assert "raw text, without a chat template: 16 documents in" in " ".join(out.split())


def independent(folder, texts):
    """Nats of every token of the text after the first character, and the bytes of that text."""
    model, tokenizer = load_model(folder, Model(name="x")), load_tokenizer(folder, Model(name="x"))
    nats, size = 0.0, 0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        head = next(n for n in range(1, len(ids)) if "\ufffd" not in tokenizer.decode(ids[:n]))
        with evaluating(model):
            logits = model(torch.tensor([ids])).logits[0].float()
        chosen = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        nats -= float(chosen[head - 1 :].sum())
        size += len(text.encode()) - len(tokenizer.decode(ids[:head]).encode())
    return nats, size


def test_resuming_on_text_gives_the_same_adapter(tiny_model, tmp_path):
    tokenizer = load_tokenizer(tiny_model, Model(name="tiny"))
    rows = Encoder(tokenizer, max_length=64, min_tokens=4).encode_all(map(document, JAPANESE[:16])).encoded
    assert len(rows) > 16  # in pieces
    whole, _ = train(tiny_model, tmp_path / "whole", rows=rows)
    watch = Watch(lambda event: watch.ask_to_stop(143) if isinstance(event, Progress) and event.done == 7 else None)
    with pytest.raises(Interrupted):
        train(tiny_model, tmp_path / "cut", watch, rows=rows)
    resumed, _ = train(tiny_model, tmp_path / "cut", rows=rows)
    assert resumed.resumed_from
    assert resumed.loss == whole.loss
    assert same(adapter_of(tmp_path / "cut"), adapter_of(tmp_path / "whole"))


# --- replay beside text, and of it


def pools(raw, replay, phase):
    raw["phases"][phase]["replay"] = {"ratio": 0.2, **replay}
    prepared = Prepared(recipe_from(raw), Watch())
    check_prepared(prepared, weights=False)
    return prepared.pools[raw["phases"][phase]["name"]]


def test_generative_replay_asks_instructions_beside_text_and_refuses_to_ask_text(raw, texts):
    (pool,) = pools(raw, {"max_new_tokens": 8}, 0)
    assert pool.reason.startswith("instructions that ship with qcft")
    assert all(row.text is None for row in pool.rows) if pool.rows[0].completion else True
    for replay in ({}, {"phase": "text"}, {"data": [{"path": str(texts), "sample_by": "line"}]}):
        with pytest.raises(InputError, match="is raw text, without prompts that the model could answer") as error:
            pools(raw, replay, 1)
        assert "kind: phase1" in error.value.hint


def test_replayed_documents_are_read_again_from_their_file(raw, tmp_path):
    rows = [document(text).as_dict() | {"provenance": {"kind": "phase1"}} for text in JAPANESE]
    path = write_rows(tmp_path / "replay.jsonl", rows)
    (pool,) = pools(raw, {"kind": "file", "path": str(path)}, 1)
    assert {row.text for row in pool.rows} <= set(JAPANESE)


def test_text_and_instructions_in_one_phase_are_measured_apart(raw, color_data):
    raw["phases"][0]["data"].append({"path": str(color_data / "es.jsonl"), "lang": "ja", "take": 12})
    raw["phases"] = [{**raw["phases"][0], "system": "be brief", "anchor": None, "replay": None}]
    prepared = Prepared(recipe_from(raw), Watch())
    check_prepared(prepared, weights=False)
    assert Counter(group.name for group in prepared.groups) == Counter(["text ja text", "text ja", "probe en"])


# --- what is refused

LINES = {"sample_by": "line", "lang": "ja"}
BAD = {
    "a system prompt": ({**LINES, "path": "good.txt"}, ["phase1.system=be brief"], "phase1 trains on raw text"),
    "thinking": ({**LINES, "path": "good.txt"}, ['phase1.thinking="off"'], "phase1 trains on raw text"),
    "a template": ({**LINES, "path": "good.txt"}, ["phase1.template=chatml"], "unknown key 'phase1.template'"),
    "a file that is one document": ({"path": "good.txt", "lang": "ja"}, [], "the held-out share"),
    "empty documents": ({"path": "empty"}, [], "can be used for training (3 empty document)"),
    "a file of blank lines": ({**LINES, "path": "blank.txt"}, [], "is empty"),
    "a binary file": ({**LINES, "path": "zeros.txt"}, [], "is binary, not text: line 1"),
    "a file in another encoding": ({**LINES, "path": "latin.txt"}, [], "is not text in UTF-8: line 2"),
    "a folder of text and rows": ({"path": "mixed"}, [], "raw text (b.txt) beside other files (a.jsonl)"),
    "rows of text and of instructions": ({"path": "both.jsonl"}, [], "rows of raw text and of alpaca"),
    "no column of text": ({"path": "rows.jsonl", "format": "text"}, [], "can be used for training (20 no column text)"),
    "documents that are too short": (
        {**LINES, "path": "good.txt"},
        ["phase1.train.text.min_tokens=999"],
        f"{TOO_SHORT})",
    ),
    "a share of a token": ({**LINES, "path": "good.txt"}, ["phase1.train.text.min_tokens=0"], "min_tokens: 0"),
    "lines of rows": ({**LINES, "path": "rows.jsonl"}, [], "is not a .txt file, which sample_by: is for"),
    "another way to sample": ({"path": "good.txt", "sample_by": "word"}, [], "sample_by: 'word'"),
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "-"))
def test_bad_text_gives_two_lines_and_nothing_is_written(qcft, raw_recipe, tmp_path, monkeypatch, case):
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))
    rows = [{"instruction": f"what color is {i}", "output": "red"} for i in range(20)]
    write_rows(tmp_path / "rows.jsonl", rows)
    write_rows(tmp_path / "both.jsonl", [*rows, {"text": "red dog"}])
    write_rows(tmp_path / "mixed" / "a.jsonl", rows)
    (tmp_path / "mixed" / "b.txt").write_text("red dog")
    (tmp_path / "empty").mkdir()
    for i in range(3):
        (tmp_path / "empty" / f"{i}.txt").write_text(" \n" * i)
    (tmp_path / "good.txt").write_text("\n".join(JAPANESE))
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "zeros.txt").write_bytes(b"\0\0\n")
    (tmp_path / "latin.txt").write_bytes(b"red\ncaf\xe9\n")
    source, sets, says = BAD[case]
    raw = {**raw_recipe, "phases": [{**raw_recipe["phases"][0], "data": [source]}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    check_refused(qcft, tmp_path, ["run", "recipe.yaml", *(one for text in sets for one in ("--set", text))], says)


# --- the recipe that ships


def test_the_recipe_for_a_new_language_is_planned_as_it_ships(qcft, tokenizer, tmp_path):
    smaller = ["--set", f"model.name={make_llama(tmp_path / 'deep', tokenizer, layers=30)}"]
    code, out, err = qcft("run", "new-language", *smaller, "--dry-run", "--json", "-q")
    assert code == 0, err
    titles = {step["title"] for step in json.loads(out)}
    assert {"train text", "train instructions", "train english"} <= titles
    assert Path(str(tmp_path / "runs")).exists() is False
