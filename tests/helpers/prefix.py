"""A training with frozen layers, from stored states where there is a store."""

import json

import torch
from safetensors.torch import load_file

from qcft.data.encode import Encoder
from qcft.data.mix import mixed_order
from qcft.data.rows import Message, Row
from qcft.events import Watch
from qcft.layers import adapted_modules, lowest_adapted
from qcft.models.adapters import add_lora
from qcft.models.load import load_model, load_tokenizer
from qcft.recipe import Lora, Model, Train, parse_freeze
from qcft.steps.prefix import open_prefix
from qcft.training.attention import attend_by_rows
from qcft.training.batches import make_batches
from qcft.training.sft import train_adapter
from qcft.training.trainer import Shortcuts

TRAIN = Train(lr=1e-2, batch=4, epochs=3, max_length=96)


WORDS = ["red", "blue", "green", "one", "two", "three", "four", "cat", "dog", "bird", "runs", "sleeps", "eats"]


def rows_of(tokenizer, count=18, seed=0):
    """Rows of odd lengths."""
    made = []
    for i in range(count):
        words = " ".join(WORDS[(i * 7 + j * (seed + 3)) % len(WORDS)] for j in range(3 + (i * 5) % 17))
        made.append(Row((Message("user", f"what number {i} {words}"),), (Message("assistant", words[::-1]),)))
    return list(Encoder(tokenizer).encode_all(made).encoded)


def train(model_folder, folder, store, settings=TRAIN, by_rows=True, watch=None, freeze="first:2", extra=4):
    """A training of new rows with replay among them; the losses of its steps and its adapter."""
    watch = watch or Watch()
    tokenizer = load_tokenizer(model_folder, Model(name="tiny"))
    rows = rows_of(tokenizer) + rows_of(tokenizer, 6, seed=5)[:extra]
    batches = make_batches(rows, lambda epoch: mixed_order(18, extra, f"0:{epoch}"), settings)
    model = load_model(model_folder, Model(name="tiny"))
    modules = adapted_modules(model, "all-linear", parse_freeze(freeze), 0)
    torch.manual_seed(0)
    adapted = add_lora(model, modules, Lora(r=4, dropout=0.1))
    below = lowest_adapted(model, modules)
    rowwise = by_rows and attend_by_rows(model, 96)
    prefix = open_prefix(model, below, rows, batches.rows, {"weights": "tiny"}, settings, store, watch)
    folder.mkdir(parents=True, exist_ok=True)
    shortcuts = Shortcuts(below, rowwise, prefix)
    train_adapter(adapted, tokenizer, batches, settings, 0, folder, watch, "training", shortcuts)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in log], load_file(folder / "adapter" / "adapter_model.safetensors"), prefix


def set_to(settings, **changes):
    return settings.model_copy(update=changes)
