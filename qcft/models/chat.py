"""The files that other tools need to chat as trained: the tokenizer, its template, the tokens that end an answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qcft.data.encode import Encoder
from qcft.data.template import is_built_in, unset_date
from qcft.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION, CONFIG = "generation_config.json", "config.json"


def write_chat(tokenizer: PreTrainedTokenizerBase, folder: Path, base: Path | None = None) -> None:
    """Write the tokenizer used in training and the tokens that end an answer into a model's or an adapter's folder.

    transformers and vLLM stop at the tokens in generation_config.json; llama.cpp, Ollama and pipelines at the
    tokenizer's EOS, which is set to the end-of-turn token if a built-in template ends turns with another token. `base`:
    the folder whose generation_config.json is the start for an adapter's; by default the folder's own.
    """
    encoder, end = Encoder(tokenizer), tokenizer.eos_token
    ends_turns = encoder.end_of_turn if is_built_in(tokenizer) else end
    template = tokenizer.chat_template
    try:
        tokenizer.eos_token, tokenizer.chat_template = ends_turns, unset_date(template)
        tokenizer.save_pretrained(folder)
        config = read_json(folder / CONFIG)
        if config is not None and ends_turns != end:
            write_json(folder / CONFIG, {**config, "eos_token_id": tokenizer.eos_token_id})
    finally:
        tokenizer.eos_token, tokenizer.chat_template = end, template
    of_base = read_json((base or folder) / CONFIG) or {}
    given = read_json((base or folder) / GENERATION) or {
        key: of_base[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in of_base
    }
    ends = given.get("eos_token_id")
    ends = [one for one in (ends if isinstance(ends, list) else [ends]) if isinstance(one, int)]
    missing = [token for token in encoder.end_ids if token not in ends]
    if missing or not (folder / GENERATION).is_file():
        write_json(folder / GENERATION, {**given, "eos_token_id": [*ends, *missing]})
