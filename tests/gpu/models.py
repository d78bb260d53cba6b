"""Models with random weights of real shapes, written to disk tensor by tensor; no network, little memory.

The 8B shape (and the tiny one of `--dry`) answers prompts with random bytes that end after about ANSWER tokens: its
embeddings share a direction that every hidden state keeps, the end-of-turn row of its head has this direction, and the
rows of tokens that are not bytes have the opposite one. So replay can be generated with it, and finished answers leave
a batch. The other shapes tie their head to their embeddings and are only trained.
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Shape(NamedTuple):
    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool


SHAPES = {
    "1B": Shape(2048, 8192, 16, 32, 8, 128256, True),  # Llama-3.2-1B
    "3B": Shape(3072, 8192, 28, 24, 8, 128256, True),  # Llama-3.2-3B
    "8B": Shape(4096, 14336, 32, 32, 8, 128256, False),  # Llama-3-8B
    "small": Shape(576, 1536, 12, 9, 3, 49152, True),  # SmolLM2-135M with 12 of its 30 layers
    "tiny": Shape(64, 128, 4, 4, 2, 512, False),
}
SPREAD = 0.02  # standard deviation of random weights, as the library has it
SHARED = 0.04  # the value that all numbers of an embedding have in common, if the head is not tied
ANSWER = 40  # tokens of an answer, on average, sampled at the temperature below
TEMPERATURE = 0.7
SHARD = 4 << 30  # bytes
END, PAD = "<|im_end|>", "<|endoftext|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_models(folder: Path, sizes: list[str]) -> None:
    """Make the missing models, one after the other. Each folder gets a file `ready` or `failed` at the end."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for size in sizes:
        place = folder / size
        if (place / "ready").is_file():
            continue
        place.mkdir(parents=True, exist_ok=True)
        (place / "failed").unlink(missing_ok=True)
        start = time.monotonic()
        try:
            make_model(SHAPES[size], place, device)
        except Exception as error:  # the parts that wait for it report it
            traceback.print_exc()
            (place / "failed").write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
            continue
        (place / "ready").touch()
        print(f"model {size}: {time.monotonic() - start:.1f} s", flush=True)


def make_model(shape: Shape, folder: Path, device: str) -> None:
    """Write config, tokenizer and random bf16 weights; at most one tensor is on `device` at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    end = make_tokenizer(folder)
    config = AutoConfig.for_model(
        "llama", hidden_size=shape.hidden, intermediate_size=shape.inner, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads, vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied, max_position_embeddings=8192, bos_token_id=end, eos_token_id=end,
        pad_token_id=end + 1,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.save_pretrained(folder)
    names = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (shape.tied and name == "lm_head.weight")
    }
    generator = torch.Generator(device).manual_seed(0)
    places: dict[str, str] = {}
    for number, part in enumerate(_shards(names)):
        file = f"model-{number:05d}.safetensors"
        save_file(
            {name: _tensor(name, names[name], shape, end, generator).cpu() for name in part},
            folder / file,
            {"format": "pt"},
        )
        places |= dict.fromkeys(part, file)
    size = sum(math.prod(one) * 2 for one in names.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _tensor(name: str, size: tuple[int, ...], shape: Shape, end: int, generator: Any) -> Any:
    import torch

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": generator.device}
    if len(size) == 1:  # the weight of a norm
        return torch.ones(size, **options)
    spread = SPREAD
    if not shape.tied and name.endswith(("o_proj.weight", "down_proj.weight")):
        # All layers together add about as much to a hidden state as the random part of an embedding.
        spread = SPREAD / math.sqrt(2 * shape.layers * size[1])
    tensor = torch.empty(size, **options).normal_(0, spread, generator=generator)
    if shape.tied:
        return tensor
    if name == "model.embed_tokens.weight":
        tensor += SHARED
    if name == "lm_head.weight":
        kept = SHARED / math.sqrt(SHARED**2 + 2 * SPREAD**2)  # of a normed hidden state, in the shared direction
        tensor[end] = _end_logit(shape.hidden) / (kept * shape.hidden)
        tensor[end + 1 :] = -30 / (kept * shape.hidden)
        tensor[end - 1] = tensor[end + 1]  # answers must not contain the start of another turn
    return tensor


def _end_logit(hidden: int) -> float:
    """The logit that ends an answer once in ANSWER tokens, if the logits of the 256 bytes are normally distributed."""
    spread = SPREAD * math.sqrt(hidden) / TEMPERATURE
    return TEMPERATURE * (math.log(256) + spread**2 / 2 - math.log(ANSWER - 1))


def _shards(names: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """The names in their order, in groups of about SHARD bytes."""
    part: list[str] = []
    size = 0
    for name, dimensions in names.items():
        part.append(name)
        size += 2 * math.prod(dimensions)
        if size >= SHARD:
            yield part
            part, size = [], 0
    if part:
        yield part


def make_tokenizer(folder: Path) -> int:
    """A tokenizer of single bytes with ChatML's tokens and template; returns the id of the end of turn."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    letters |= {"<|im_start|>": 256, END: 257, PAD: 258}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return letters[END]


if __name__ == "__main__":
    make_models(Path(sys.argv[1]), sys.argv[2].split(","))
