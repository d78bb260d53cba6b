"""A tokenizer as a GGUF file's metadata: tokens with their types, merges or scores, and the pre-tokenizer.

Two kinds are supported: byte-level BPE (`gpt2` in GGUF), which names its pre-tokenizer, as llama.cpp has the regular
expression of each one built in; and SentencePiece's BPE with byte fallback (`llama`), which orders merges by scores.
The keys: docs/gguf.md of the ggml project.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qcft.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

SPACE = "\u2581"  # SentencePiece's
DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS, _REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|", r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _WORDS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST
QWEN2 = _WORDS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _REST
)
# llama.cpp's names (src/llama-vocab.cpp), by the expressions that split the text one after the other.
PRE_TOKENIZERS = {
    (GPT2,): "gpt-2", (DIGIT, GPT2): "smollm", (LLAMA3,): "llama-bpe", (QWEN2,): "qwen2", (TEKKEN,): "tekken",
}  # fmt: skip
WITHOUT_MERGES = {"llama-bpe": "smaug-bpe"}  # the same splits; words in the vocabulary are merged from pieces too
NORMALIZERS = {"gpt2": {"NFC"}, "llama": {"Prepend", "Replace"}}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError for a tokenizer that GGUF, or this module, does not support."""
    shape, backend = _shape(tokenizer)
    if shape == "gpt2":
        _pre_tokenizer(backend)


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, ends: Sequence[int]) -> None:
    """Write a tokenizer and its chat template. `rows`: the number of rows of the embedding, and so of tokens to write;
    `ends`: the ids that end an answer. Raises InputError as `check_tokenizer` does."""
    shape, backend = _shape(tokenizer)
    tokens, types = _tokens(tokenizer, shape, backend, rows)
    writer.add_tokenizer_model(shape)
    writer.add_tokenizer_pre(_pre_tokenizer(backend) if shape == "gpt2" else "default")
    writer.add_token_list(tokens)
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in backend["model"]["merges"]]
    if shape == "gpt2":
        writer.add_token_merges([" ".join(merge) for merge in merges])
    else:
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_prepends_space(tokenizer))
    writer.add_token_types(types)
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id,
           "pad": tokenizer.pad_token_id}  # fmt: skip
    ids["eot"] = next((one for one in ends if one != tokenizer.eos_token_id), None)
    for name, number in ids.items():
        if number is not None and number < rows:
            getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(adds_bos(tokenizer))
    writer.add_add_eos_token(bool(tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id))
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether programs that read the file must put BOS before a text."""
    return bool(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


def _shape(tokenizer: PreTrainedTokenizerBase) -> tuple[str, dict[str, Any]]:
    """`gpt2` or `llama`, and the tokenizer's JSON description. Raises InputError."""
    backend: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    if model["type"] != "BPE":
        raise _unknown(f"a {model['type']} tokenizer")
    shape = "llama" if model.get("byte_fallback") else "gpt2"
    for part in _parts(backend["normalizer"], "normalizers"):
        if part["type"] not in NORMALIZERS[shape]:
            raise _unknown(f"a tokenizer that normalises text by {part['type']}")
    return shape, backend


def _pre_tokenizer(backend: dict[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer splits text. Raises InputError."""
    splits: list[str] = []
    for part in _parts(backend["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
            splits += [GPT2] if part["use_regex"] else []
        elif part["type"] == "Digits" and part["individual_digits"]:
            splits.append(DIGIT)
        elif part["type"] == "Split" and part["behavior"] == "Isolated" and "Regex" in part["pattern"]:
            splits.append(part["pattern"]["Regex"])
        else:
            raise _unknown(f"a tokenizer that splits text by {part['type']}")
    name = PRE_TOKENIZERS.get(tuple(splits))
    if name is None:
        raise _unknown("a tokenizer that splits text by another expression")
    return name if backend["model"].get("ignore_merges") else WITHOUT_MERGES.get(name, name)


def _parts(found: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """The parts of a normalizer or a pre-tokenizer, which may be a sequence, a single one, or None."""
    if found is None:
        return []
    return [one for part in found[inside] for one in _parts(part, inside)] if inside in found else [found]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, shape: str, backend: dict[str, Any], rows: int
) -> tuple[list[str], list[int]]:
    """The text and the type of each token; a row of the embedding without a token gets a name like `[PAD7]`."""
    from gguf import TokenType

    named = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(rows):
        text, kind = named.get(number, f"[PAD{number}]"), TokenType.NORMAL
        if number not in named:
            kind = TokenType.UNUSED
        elif number in added:
            special = added[number].special or (text.startswith("<|") and text.endswith("|>"))
            kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
            text = text if special else text.replace(SPACE, " ")  # as llama.cpp searches for it in the text
        elif shape == "llama" and len(text) == 6 and text.startswith("<0x"):
            kind = TokenType.BYTE
        if shape == "llama" and text == backend["model"].get("unk_token"):
            kind = TokenType.UNKNOWN
        tokens.append(text)
        types.append(int(kind))
    return tokens, types


def _scores(tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> list[float]:
    """SentencePiece's scores: the earlier a piece is merged, the higher. Pieces without a merge come last."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _prepends_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether text after a special token is tokenised as if a space were before it: llama.cpp does this after every
    special token, some tokenizers only at the beginning of a text."""
    return bool(tokenizer.tokenize(f"{tokenizer.all_special_tokens[0]}a")[1].startswith(SPACE))


def _unknown(what: str) -> InputError:
    return InputError(
        f"--gguf: the model has {what}, which qcft cannot write as GGUF",
        "name the folder of llama.cpp's converter with --llama-cpp, or export without --gguf and run "
        "`convert_hf_to_gguf.py DIR`",
    )
