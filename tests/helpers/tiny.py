"""Tiny models, tokenizers, data and recipes, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = "red blue green one two three four cat dog bird runs sleeps eats the a is what color number animal"


def make_tokenizer(folder: Path):
    """A byte-level BPE tokenizer trained on a few words, with ChatML's tokens and template; saved in `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from qcft.data.template import CHATML

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([WORDS] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHATML.replace("END", "<|im_end|>")
    fast.save_pretrained(folder)
    return fast


def make_llama(folder: Path, tokenizer, layers: int = 3, seed: int = 0, **options) -> Path:
    """A tiny random Llama in bf16, saved with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **{**sizes, "tie_word_embeddings": True, **options},
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


COLORS = {"en": ("red", "blue", "green"), "es": ("rojo", "azul", "verde"), "pt": ("vermelho", "azul", "verde")}


ASK = {"en": "what color is the cat number", "es": "de que color es el gato numero", "pt": "de que cor e o gato numero"}


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make_color_data(folder: Path) -> Path:
    """en.jsonl, es.jsonl, pt.jsonl: 60 rows parallel by id."""
    for lang, colors in COLORS.items():
        rows = [
            {
                "id": f"c{i}",
                "instruction": f"{ASK[lang]} {i}",
                "input": "",
                "output": f"{colors[i % 3]} {colors[i % 3]}",
            }
            for i in range(60)
        ]
        write_rows(folder / f"{lang}.jsonl", rows)
    return folder


def make_recipe(model: Path, color_data: Path) -> dict:
    """A two-phase recipe on the tiny model, small enough for seconds."""
    return {
        "name": "tiny",
        "model": {"name": str(model)},
        "lora": {"r": 4, "alpha": 8},
        "heldout": {"share": 0.2, "rows": 6},
        "answers": {"prompts": 3, "max_new_tokens": 8},
        "phases": [
            {
                "name": "phase1",
                "data": [{"path": str(color_data / "en.jsonl"), "take": 24, "lang": "en"}],
                "train": {"lr": 1e-2, "batch": 4, "max_length": 64, "epochs": 2},
            },
            {
                "name": "phase2",
                "data": [{"path": str(color_data / "{lang}.jsonl"), "lang": ["es", "pt"], "take": 12}],
                "freeze": "first:1",
                "replay": {"ratio": 0.2, "kind": "english", "data": [{"path": str(color_data / "en.jsonl")}]},
                "train": {"lr": 5e-3, "batch": 4, "max_length": 64},
            },
        ],
    }
