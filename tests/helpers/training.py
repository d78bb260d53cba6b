"""A training of a few rows on a tiny model, and what it left."""

import json
from dataclasses import replace

import torch
from safetensors.torch import load_file

from qcft.data.encode import Encoder
from qcft.data.mix import mixed_order
from qcft.data.rows import Message, Row
from qcft.events import Watch
from qcft.layers import adapted_modules
from qcft.models.adapters import add_lora
from qcft.models.load import load_model, load_tokenizer
from qcft.recipe import Lora, Model, Train, parse_freeze
from qcft.training.batches import make_batches
from qcft.training.sft import train_adapter
from qcft.training.trainer import NO_SHORTCUTS

TRAIN = Train(lr=1e-2, batch=4, epochs=3, max_length=64, checkpoint_steps=2)


def rows_of(tokenizer, count=24):
    made = [
        Row(
            (Message("user", f"what number is {i}"),), (Message("assistant", "red dog" if i % 2 else "blue bird runs"),)
        )
        for i in range(count)
    ]
    encoded = Encoder(tokenizer).encode_all(made).encoded
    return [replace(row, source="odd" if i % 2 else "even") for i, row in enumerate(encoded)]


def train(model_folder, folder, watch=None, settings=TRAIN, lora=None, shortcuts=NO_SHORTCUTS, rows=None):
    tokenizer = load_tokenizer(model_folder, Model(name="tiny"))
    rows = rows or rows_of(tokenizer)
    batches = make_batches(rows, lambda epoch: mixed_order(len(rows), 0, f"0:{epoch}"), settings)
    model = load_model(model_folder, Model(name="tiny"))
    torch.manual_seed(0)
    adapted = add_lora(
        model, adapted_modules(model, "all-linear", parse_freeze("first:1"), 0), lora or Lora(r=4, dropout=0.1)
    )
    folder.mkdir(exist_ok=True)
    return train_adapter(
        adapted, tokenizer, batches, settings, 0, folder, watch or Watch(), "training", shortcuts
    ), adapted


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def adapter_of(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
