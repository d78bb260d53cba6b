"""A tiny model without weights, and the shape of a training of it."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from qcft.layers import adapted_modules
from qcft.recipe import Lora, parse_freeze
from qcft.training.footprint import TrainingShape


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def tiny_meta(**options):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return on_meta(LlamaConfig(vocab_size=400, num_hidden_layers=6, tie_word_embeddings=True, **(sizes | options)))


def shape_of(model, freeze="none", checkpointing=False, **options):
    modules = tuple(adapted_modules(model, "all-linear", parse_freeze(freeze), 0))
    return TrainingShape(modules, Lora(), options.pop("quantize", "nf4"), checkpointing, **options)
