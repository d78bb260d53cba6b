"""Generated replay: sampling, batches and memory, chunks that outlive a kill, pools that all ratios share."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml

import qcft
from qcft.data.encode import Encoder
from qcft.data.rows import Message, Row
from qcft.events import Note, Watch
from qcft.files import read_json
from qcft.models.generate import Nucleus, Sampling, answer_batches
from qcft.models.load import load_model, load_tokenizer
from qcft.recipe import Model, Phase, ReplayPart, load_recipe
from qcft.replay.generation import Answering, Generated, Generation
from qcft.replay.pools import Pool
from qcft.replay.rows import Drawing, make_replay, read_replay
from qcft.report.cells import cut_in_words

from .helpers.tiny import make_llama

SETTINGS = {"ratio": 0.5, "max_new_tokens": 24, "temperature": 0, "chunk": 4, "filters": {"language": None}}


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tokenizer) -> Path:
    """A tiny model that answers prompts of a kind with a few words, and ends."""
    from transformers import LlamaForCausalLM

    folder = make_llama(tmp_path_factory.mktemp("taught"), tokenizer, layers=2)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    encoder, colors = Encoder(tokenizer), ("red", "blue", "green")
    rows = [Row(ask(i).prompt, (Message("assistant", f"{colors[i % 3]} " * (1 + i % 5)),)) for i in range(40)]
    encoded = encoder.encode_all(rows).encoded
    width = max(len(row.input_ids) for row in encoded)
    ids = torch.tensor([row.input_ids + [0] * (width - len(row.input_ids)) for row in encoded])
    labels = torch.tensor([row.labels + [-100] * (width - len(row.labels)) for row in encoded])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    torch.manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def ask(number: int) -> Row:
    return Row((Message("user", f"what color is {'the cat ' * (number % 4)}number {number}"),), (), f"p{number}")


def draw(folder: Path, model_folder: Path, new_rows: int, **replay) -> dict:
    """Generated replay beside so many new rows, in `folder`; its pool in `folder/../pool`."""
    model = Model(name=str(model_folder))
    encoder = Encoder(load_tokenizer(model_folder, model), max_length=128)
    phase = Phase.model_validate({"name": "phase2", "data": "x", "replay": {**SETTINGS, **replay}})
    new = encoder.encode_all(Row(ask(i).prompt, (Message("assistant", "red"),), f"n{i}") for i in range(new_rows))
    prompts = tuple(ask(i) for i in range(60))
    place = folder.parent / "pool"
    place.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    load = lambda: load_model(model_folder, model)  # noqa: E731
    asked = phase.replay
    how = Answering(0, asked.max_new_tokens, asked.temperature, asked.top_p, asked.chunk, asked.batch)
    made = Generation(place, prompts, how, encoder, load, Watch())
    pool = Pool(ReplayPart(), prompts, "prompts of a test", {})
    return make_replay(phase.name, phase.replay, [pool], [new], encoder, [(made, "model", "pool")], folder, Watch())


def test_killed_three_times_in_the_middle_gives_the_same_file(taught, tmp_path):
    """SIGKILL in a process of its own, each time one chunk further; then to the end."""
    whole = draw(tmp_path / "whole" / "replay", taught, 36)
    code = "import torch; torch.set_num_threads(1)\nfrom pathlib import Path\nfrom tests.test_generation import draw\n"
    code += f"draw(Path({str(tmp_path / 'cut' / 'replay')!r}), Path({str(taught)!r}), 36)"
    chunks = tmp_path / "cut" / "pool" / "chunks"
    root = Path(__file__).parents[1]
    for kill in (1, 2, 3):
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.PIPE
        )
        while len(list(chunks.glob("*.json"))) < kill and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()[-2000:]
        assert not (tmp_path / "cut" / "replay" / "replay.jsonl").exists()
    assert len(list(chunks.glob("*.json"))) >= 3
    metrics = draw(tmp_path / "cut" / "replay", taught, 36)
    for name in ("replay.jsonl", "left_out.jsonl"):
        assert (tmp_path / "cut" / "replay" / name).read_text() == (tmp_path / "whole" / "replay" / name).read_text()
    assert metrics["rows"] == whole["rows"] == 36
    assert metrics["parts"][0]["generation"]["chunks_reused"] >= 3


def test_a_larger_ratio_adds_chunks_and_begins_with_the_same_rows(taught, tmp_path):
    small = draw(tmp_path / "small", taught, 9, temperature=0.7)
    large = draw(tmp_path / "large", taught, 30, temperature=0.7)
    tokens = draw(tmp_path / "tokens", taught, 30, temperature=0.7, unit="tokens", filters={"loops": None})
    first, more = ((tmp_path / name / "replay.jsonl").read_text() for name in ("small", "large"))
    assert more.startswith(first)
    assert small["parts"][0]["generation"]["chunks_reused"] == 0
    assert large["parts"][0]["generation"]["chunks_reused"] == small["parts"][0]["generation"]["chunks_made"]
    assert tokens["parts"][0]["generation"]["chunks_made"] == 0  # filters and units choose, they do not generate
    row = json.loads(first.splitlines()[0])
    assert row["provenance"]["model"] == "model"
    assert {"prompt", "pool", "chunk", "seed", "temperature", "top_p", "max_new_tokens"} <= row["provenance"].keys()


def test_a_chunk_that_was_altered_is_generated_again(taught, tmp_path):
    draw(tmp_path / "one", taught, 9)
    file = tmp_path / "pool" / "chunks" / "000001.json"
    chunk = json.loads(file.read_text())
    assert sorted(i for batch in chunk["batches"] for i in batch) == list(range(4))
    chunk["answers"][0]["text"] = "altered"
    file.write_text(json.dumps(chunk))
    draw(tmp_path / "two", taught, 9)
    assert (tmp_path / "one" / "replay.jsonl").read_text() == (tmp_path / "two" / "replay.jsonl").read_text()


@pytest.fixture(scope="module")
def loaded(taught):
    model = Model(name=str(taught))
    return load_model(taught, model), Encoder(load_tokenizer(taught, model))


def answers_of(loaded, batch, temperature=0.0, count=13):
    model, encoder = loaded
    prompts = [encoder.prompt_ids(ask(i)) for i in range(count)]
    sampling = Sampling(24, temperature, 0.9, 5)
    return answer_batches(model, encoder.tokenizer, prompts, encoder.end_ids, sampling, batch, lambda done, made: None)


def test_the_batch_is_halved_until_it_fits(loaded):
    """A forward pass of more than three rows runs out of memory, as a GPU would report it."""

    def refuse(module, args, kwargs):
        if kwargs["input_ids"].shape[0] > 3:
            raise torch.OutOfMemoryError("no memory left")

    handle = loaded[0].register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        answers, batches = answers_of(loaded, 13)
    finally:
        handle.remove()
    assert [len(batch) for batch in batches] == [3, 3, 3, 3, 1]
    assert sorted(i for batch in batches for i in batch) == list(range(13))
    assert [a.text for a in answers] == [a.text for a in answers_of(loaded, 64)[0]]
    handle = loaded[0].register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    try:
        with pytest.raises(qcft.QcftError, match="memory ran out while answering a prompt of"):
            answers_of(loaded, 2)
    finally:
        handle.remove()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_drawn_does_not_depend_on_the_batch(loaded, temperature):
    texts = [[a.text for a in answers_of(loaded, batch, temperature)[0]] for batch in (1, 5, 64)]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 2


@pytest.mark.parametrize("kind", ["gemma3_text", "qwen2", "qwen3_next"])
def test_answers_are_those_of_plain_generate_whatever_the_cache(kind, tokenizer):
    """Sliding windows shorter than the answers, and layers whose state cannot lose rows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "num_hidden_layers": 4, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    if kind == "gemma3_text":
        sizes |= {"sliding_window": 12, "initializer_range": 0.1}
    if kind == "qwen3_next":
        sizes |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
        sizes |= {"linear_value_head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1}
        sizes |= {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).float().eval()
    encoder = Encoder(tokenizer)
    prompts = [encoder.prompt_ids(ask(i)) for i in range(5)]
    ends = [*encoder.end_ids, 30, 31, 32, 33, 34, 35, 36, 37]  # so that some answers end early
    answers, _ = answer_batches(model, tokenizer, prompts, ends, Sampling(40), 8, lambda done, made: None)
    for prompt, answer in zip(prompts, answers, strict=True):
        made = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=40, do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id,
        )[0, len(prompt) :].tolist()  # fmt: skip
        text = made[: next((i for i, t in enumerate(made) if t in ends), len(made))]
        assert answer.tokens == len(text)
        assert answer.text == tokenizer.decode(text, skip_special_tokens=True).strip()


@pytest.mark.parametrize("top_p", [0.3, 0.9, 1.0])
def test_the_nucleus_is_that_of_transformers_and_its_draws_follow_the_probabilities(top_p):
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    torch.manual_seed(0)
    scores = torch.randn(1, 300) * 2
    expected = TopPLogitsWarper(top_p)(None, TemperatureLogitsWarper(0.7)(None, scores)).softmax(-1)[0]
    draws = 3000
    nucleus = Nucleus(Sampling(1, 0.7, top_p), list(range(draws)))
    found = nucleus(torch.zeros(draws, 1), scores.expand(draws, -1))
    assert (torch.isfinite(found).sum(1) == 1).all()
    counts = torch.bincount(found.argmax(1), minlength=300) / draws
    assert not counts[expected == 0].any()
    assert (counts - expected).abs().max() < 0.04


def test_more_than_the_likeliest_tokens_are_considered_where_the_mass_is_spread():
    scores = torch.zeros(4, 5000)
    found = Nucleus(Sampling(1, 1.0, 0.9), [0, 1, 2, 3])(torch.zeros(4, 1), scores)
    assert len(set(found.argmax(1).tolist())) == 4


@pytest.fixture
def recipe_file(raw_recipe, tmp_path):
    raw_recipe["phases"][0]["train"]["epochs"] = 12
    raw_recipe["phases"][1] |= {
        "replay": {
            "ratio": 0.25,
            "mix": [{"kind": "generative", "weight": 3}, "phase1"],
            "max_new_tokens": 24,
            "chunk": 4,
            "filters": {"language": None},
        },
        "train": {"lr": 5e-3, "batch": 4, "max_length": 64, "epochs": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw_recipe))
    return path


def test_from_the_command_line(qcft, recipe_file, tmp_path):
    """Two kinds mixed, trained and counted; looked at, edited and given back; another ratio shares the pool."""
    runs = ["--runs", tmp_path / "runs"]
    code, out, err = qcft("run", recipe_file, *runs, "--json")
    assert code == 0, err
    done = read_json(tmp_path / "runs" / "tiny" / "phase2" / "done.json")["metrics"]
    exposure = {e["source"]: e for e in done["exposure"]}
    mix = {e["source"]: e for e in done["mix"]}
    assert mix["replay (generative)"]["rows"] == 6
    assert mix["replay (phase1)"]["rows"] == 2
    assert exposure.keys() == mix.keys()
    for source, entry in exposure.items():  # two epochs
        assert {k: entry[k] for k in ("rows", "tokens", "answer_tokens")} == {
            k: 2 * mix[source][k] for k in ("rows", "tokens", "answer_tokens")
        }
    code, out, err = qcft("replay", "tiny", "--show", 3, *runs)
    assert code == 0, err
    assert out.count("user: ") == 3
    assert "25.0% of the mix's rows" in out
    assert "generated " in out
    code, out, err = qcft("replay", "tiny", "--show", 8, "--json", *runs)
    shown = json.loads(out)
    assert Counter(s["provenance"]["kind"] for s in shown["samples"]) == {"generative": 6, "phase1": 2}
    assert [p["kind"] for p in shown["parts"]] == ["generative", "phase1"]

    code, out, err = qcft("replay", "tiny", "--ratio", 0.1, "--json", *runs)
    assert code == 0, err
    smaller = json.loads(out)
    assert (smaller["run"], smaller["rows"]) == ("tiny-2", 3)
    assert smaller["parts"][0]["generation"]["chunks_made"] == 0
    assert not (tmp_path / "runs" / "tiny-2" / "phase2").exists()

    edited = tmp_path / "edited.jsonl"
    lines = Path(shown["file"]).read_text().splitlines()
    edited.write_text("\n".join(line.replace("what color", "which color") for line in lines) + "\n")
    back = ["--set", f"phase2.replay={{ratio: 0.25, kind: file, path: {edited}}}"]
    code, out, err = qcft("replay", "tiny", *back, "--show", 8, "--json", *runs)
    assert code == 0, err
    given = json.loads(out)
    assert given["rows"] == 8
    assert all("which color" in s["prompt"][0]["content"] for s in given["samples"])
    assert {s["provenance"]["kind"] for s in given["samples"]} == {"file"}


def test_generation_starts_with_a_batch_that_fits(qcft, recipe_file, tmp_path, monkeypatch):
    """With room for the answers to two prompts, as the estimate has it, instead of a whole chunk of four."""
    runs = ["--runs", tmp_path / "runs"]
    code, out, _ = qcft("check", recipe_file, "--json", "--rows", 0, *runs)
    assert code == 0
    memory = next(step["memory"] for step in json.loads(out)["steps"] if step["kind"] == "replay")
    room = (memory["total"] - memory["cache"] / 2) / 0.9 + 1
    assert qcft("run", recipe_file, *runs)[0] == 0
    whole = read_json(tmp_path / "runs" / "tiny" / "replay" / "done.json")["metrics"]["parts"][0]["generation"]
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=room))
    assert qcft("replay", "tiny", "--set", "phase2.replay.temperature=0.6", *runs)[0] == 0
    small = read_json(tmp_path / "runs" / "tiny-2" / "replay" / "done.json")["metrics"]["parts"][0]["generation"]
    assert (whole["batch"], small["batch"]) == (4, 2)


def test_a_run_without_replay_says_so(qcft, recipe_file, tmp_path):
    runs = ["--runs", tmp_path / "runs"]
    assert qcft("replay", "tiny", *runs)[0] == 2
    recipe = load_recipe(recipe_file, {"phase2.replay": 0})
    recipe_file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    code, _, err = qcft("run", recipe_file, *runs, "--set", "phase2=null", "--set", "phase1.train.steps=1")
    assert code == 0, err
    code, _, err = qcft("replay", "tiny", *runs)
    assert code == 2
    assert "has no replay" in err


def test_a_ratio_of_0_generates_nothing(recipe_file, tmp_path):
    changes = {"phase2.replay": 0, "phase1.train.steps": 1, "phase2.train.steps": 1}
    done = qcft_run(recipe_file, tmp_path / "runs", changes)
    assert "replay" not in done.stages
    assert not list((tmp_path / "runs" / ".steps").glob("pool-*"))


def qcft_run(recipe_file, runs, changes):
    events = []
    done = qcft.run(recipe_file, set=changes, runs=runs, listener=events.append)
    assert not any(isinstance(e, Note) and "replay" in e.text for e in events)
    return done


def test_unfinished_answers_are_kept_up_to_where_they_were_cut(taught, tmp_path):
    """With what that does to lengths in the metrics; a filter drops them as before. Both draw from one pool."""
    kept = draw(tmp_path / "kept", taught, 20, max_new_tokens=5)
    rows = [json.loads(line) for line in (tmp_path / "kept" / "replay.jsonl").read_text().splitlines()]
    cut = [row for row in rows if not row["completion"][-1].get("finished", True)]
    part = kept["parts"][0]
    assert 0 < len(cut) < len(rows) == 20
    assert part["cut"] == {"rows": len(cut), "answer_tokens": sum(row["answer_tokens"] for row in cut)}
    assert all("finished" not in row["completion"][-1] for row in rows if row not in cut)
    encoder = Encoder(load_tokenizer(taught, Model(name="tiny")))
    for row, _ in read_replay(tmp_path / "kept" / "replay.jsonl"):
        (encoded,) = encoder.encode(row)
        assert (encoded.labels[-1] in encoder.end_ids) is row.completion[-1].finished
    dropped = draw(tmp_path / "dropped", taught, 20, max_new_tokens=5, filters={"language": None, "unfinished": True})
    assert dropped["parts"][0]["cut"]["rows"] == 0
    assert dropped["left_out"]["unfinished answer"] >= len(cut)
    left_out = [json.loads(line) for line in (tmp_path / "dropped" / "left_out.jsonl").read_text().splitlines()]
    assert {row["id"] for row in cut} <= {row["id"] for row in left_out if row["reason"] == "unfinished answer"}
    longer = part["answer_tokens"] / part["rows"]
    assert longer > dropped["answer_tokens"] / dropped["rows"]
    said = cut_in_words(part)
    assert f"{20 - len(cut)} answers finished, {len(cut)} cut off at the maximum length" in said
    assert f"mean {longer:.0f} answer tokens" in said
    assert cut_in_words(dropped["parts"][0]) == ""
    assert cut_in_words({key: value for key, value in part.items() if key != "cut"}) == "", "of an earlier version"


def test_half_a_character_is_not_part_of_an_answer(tokenizer):
    """What cuts an answer may cut a character of several tokens: decoding leaves a mark, which nobody wrote."""
    encoder = Encoder(tokenizer)
    drawing = Drawing(Pool(ReplayPart(), (), "t", {}), encoder, set())
    replay = Phase.model_validate({"name": "p", "data": "x", "replay": 0.2}).replay
    generated = [Generated(ask(i), "red \ufffd", 3, finished, None, 0, 0) for i, finished in enumerate((False, True))]
    texts = [one.row.completion[0].content for one in drawing.answers(iter(generated), replay, "m", "p")]
    assert texts == ["red", "red \ufffd"]
