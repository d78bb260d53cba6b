"""The command lines of README.md and recipes/README.md, run as they are, in order, in a folder where their files
are, and where folders with a tiny model and a tiny encoder have the names of those on the hub."""

import io
import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from .helpers.encoders import static_encoder
from .helpers.tiny import WORDS, make_llama, write_rows
from .test_documents import shell_lines

# Not here, with the reason; the rest of what the documents show is in `test_documents.py`, which parses every line.
ELSEWHERE = {
    "run quickstart": "minutes: test_real.py runs it",
    "init": "asks in a terminal: test_init.py answers",
    "chat spanish": "asks in a terminal: test_answers.py writes to it, as to the line with < prompts.txt",
    "eval spanish --suite english --suite multilingual --limit 200": "data of the hub: test_suites_on_hub.py has one",
    "dial spanish --by layers=0-9:0.5,20-29:0": "30 layers: test_dial.py has three",
    "dial spanish --by auto": "eight measurements: test_dial.py has them",
    "ablate quick-ablation-cpu": "40 minutes: the line before it is its plan",
    "phase2 japanese --model smollm2-135m-instruct --data ja=ja.txt --set phase2.data.0.sample_by=line --replay 0.2": (
        "a model and text of its own: the next test"
    ),
}
LINES = [words for document in ("README.md", "recipes/README.md") for words in shell_lines(document)]
LINES = [words for number, words in enumerate(LINES) if words not in LINES[:number]]  # each once


@pytest.fixture(scope="module")
def files(tmp_path_factory, tokenizer, tokenizer_folder, color_data):
    """A folder with the files that the documents name."""
    place = tmp_path_factory.mktemp("documents")
    small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "tie_word_embeddings": False}
    ready_to_end(make_llama(place / "HuggingFaceTB" / "SmolLM2-1.7B-Instruct", tokenizer, layers=13, **small))
    (place / "sentence-transformers").mkdir()
    static_encoder(place / "sentence-transformers" / "LaBSE", tokenizer_folder)
    static_encoder(place / "FOLDER", tokenizer_folder)
    for name, lang in {"alpaca": "en", "en": "en", "es": "es", "pt": "pt"}.items():
        lines = (color_data / f"{lang}.jsonl").read_text().splitlines(keepends=True)
        (place / f"{name}.jsonl").write_text("".join(lines[:30]))
    words = WORDS.split()
    question = {"context": WORDS, "answers": {"text": [words[0]], "answer_start": [0]}}
    write_rows(place / "xquad" / "es.jsonl", [{"id": str(i), "question": f"what {i}", **question} for i in range(4)])
    (place / "prompts.txt").write_text("what color is the cat\n")
    return place


def ready_to_end(folder):
    """Make a random model's answers short: whatever it has read, its last states share a direction, along which the
    token that ends an answer is about as likely as the likeliest other token."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight += 1
        states = model.model(input_ids=torch.arange(5, 200)[None]).last_hidden_state[0]
        most, mean = model.lm_head(states).max(dim=-1).values.mean(), states.mean(dim=0)
        model.lm_head.weight[model.config.eos_token_id] = most * mean / mean.square().sum()
    model.save_pretrained(folder)


def test_what_is_not_run_is_in_the_documents():
    assert set(ELSEWHERE) <= {" ".join(words) for words in LINES}


def test_command_lines_do_what_they_say(files, qcft, monkeypatch):
    monkeypatch.chdir(files)
    monkeypatch.setenv("QCFT_CACHE", str(files / "cache"))
    sources = [part for lang in ("es", "pt") for part in ("--data", f"{lang}={lang}.jsonl")]
    code, _, err = qcft("init", "--model", "HuggingFaceTB/SmolLM2-1.7B-Instruct", *sources, "-o", "recipe.yaml")
    assert code == 0, err
    printed = {}
    for words in LINES:
        words, given, to = redirected(words)
        line = " ".join(words)
        if line in ELSEWHERE and not given:
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO((files / given).read_text() if given else ""))
        code, printed[line], err = qcft(*words)
        assert code == 0, (line, err)
        if to:
            (files / to).write_text(printed[line])
    assert "fits an 8 GB GPU" in printed["check recipe.yaml --vram 8GB"]
    assert json.loads(printed["replay spanish --ratio 0.1 --json"])
    assert (files / "spanish-model" / "model.safetensors").exists()
    assert (files / "DIR" / "model.safetensors").exists()
    assert "<html" in (files / "answers.html").read_text()
    assert (files / "runs" / "spanish-2" / "report" / "report.html").exists()
    assert (files / "answers.txt").read_text().strip()


def redirected(words):
    """A command, the file that it reads and the file that it writes."""
    files = {mark: words[words.index(mark) + 1] if mark in words else None for mark in "<>"}
    end = min((words.index(mark) for mark in "<>" if mark in words), default=len(words))
    return words[:end], files["<"], files[">"]


def test_a_phase_on_text_as_the_documents_have_it(files, qcft, tmp_path):
    """A folder with the name of the embedded model is used in its place."""
    words = next(words for words in LINES if words[:2] == ["phase2", "japanese"])
    (tmp_path / "smollm2-135m-instruct").symlink_to(files / "HuggingFaceTB" / "SmolLM2-1.7B-Instruct")
    (tmp_path / "ja.txt").write_text("".join(f"猫は{i}回、庭で眠ります。犬は外を走ります。\n" for i in range(40)))
    code, out, err = qcft(*words)
    assert code == 0, err
    assert "phase2 ja text" in out
    assert (tmp_path / "runs" / "japanese" / "phase2" / "adapter").is_dir()
