"""A model written as GGUF: read back with equal tokens and logits, its metadata as llama.cpp expects them."""

import json

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from qcft.errors import InputError
from qcft.events import Watch
from qcft.models.gguf_vocab import PRE_TOKENIZERS
from qcft.models.gguf_write import write_gguf
from qcft.models.load import load_gguf
from qcft.models.sources import check_gguf, resolve, weights_folder
from qcft.recipe import Model

from .helpers.families import LLAMA3_ROPE, make_words

TEXTS = ["what color is the cat number 12", "Two  spaces, it's 3.14!\n\nNew line ", "<|im_start|>user\nHola señor 🚀"]
SMALL = {
    "vocab_size": 1216, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.08, "bos_token_id": 0,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# What transformers' reader of GGUF takes for granted: Qwen 3's head_dim, Gemma 3's head_dim, layers and rotary bases.
SHAPES = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "mistral": {"head_dim": 32, "sliding_window": None, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen3": {"head_dim": 128, "tie_word_embeddings": False},
    "gemma3_text": {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 16},
}


# How each family's tokenizers split text, by llama.cpp's names; Mistral's and Gemma's are SentencePiece's.
SPLITS = {"llama": "llama-bpe", "mistral": "spm", "qwen2": "qwen2", "qwen3": "qwen2", "gemma3_text": "gemma"}


def give_tokenizer(folder, split):
    """A tokenizer of a thousand words that splits text as llama.cpp's `split` does, in a model's folder."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.tokenization_utils_base import generate_merges

    make_words(folder)
    words = json.loads((folder / "tokenizer.json").read_text())
    splits = next((key for key, name in PRE_TOKENIZERS.items() if name == split), ())
    if splits:
        parts = [pre_tokenizers.Split(Regex(one), "isolated") for one in splits]
        made = Tokenizer.from_str(json.dumps(words))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    else:
        special = [one["content"] for one in words["added_tokens"]]
        pieces = [a + b for a, b in words["model"]["merges"] if (a + b).replace("Ġ", "").isascii()]
        pieces = [piece.replace("Ġ", "▁") for piece in pieces]
        chars = sorted({char for piece in pieces for char in piece})
        tokens = ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *chars]
        vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
        ranks = {piece: float(-rank) for rank, piece in enumerate(pieces)}
        scores = {token: ranks.get(token, -1e6) for token in vocab}
        merges = generate_merges(vocab, scores, skip_tokens={"<unk>", *special})
        made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        replace = normalizers.Replace(" ", "▁")
        if split == "spm":
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if split == "old" else replace
        if split == "gemma":
            made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        made.add_special_tokens(special)
    template = AutoTokenizer.from_pretrained(folder).chat_template
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", bos_token="<|endoftext|>")
    fast.chat_template = template
    fast.save_pretrained(folder)


def make(folder, kind, split=None, **options):
    """A tiny model of a family with every weight other than it begins, norms and biases too."""
    from transformers import CONFIG_MAPPING

    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**{**SMALL, **SHAPES.get(kind, {}), **options})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.add_(0.1 * torch.randn(weight.shape))
    model.to(torch.bfloat16).save_pretrained(folder)
    give_tokenizer(folder, split or SPLITS[kind])
    return folder


def write(folder, file, kind="f16"):
    file.parent.mkdir(exist_ok=True)
    write_gguf(folder, file, kind, "tiny", Model(name=str(folder)), Watch())
    check_gguf(file)
    return file


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits.float()


def fields(file):
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QCFT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", SHAPES)
def test_a_file_read_back_has_equal_tokens_and_logits(kind, tmp_path):
    folder = make(tmp_path / "model", kind)
    file = write(folder, tmp_path / "out" / "tiny.gguf")
    back = weights_folder(resolve(Model(name=str(file))), Watch())
    before, after = (AutoTokenizer.from_pretrained(one) for one in (folder, back))
    assert after.chat_template == before.chat_template
    assert (after.eos_token, after.bos_token) == (before.eos_token, before.bos_token)
    for text in TEXTS:
        assert after(text).input_ids == before(text).input_ids, text
    ids = torch.tensor([before(" ".join(TEXTS)).input_ids])
    assert ids.shape[1] > 32  # longer than Gemma's window
    expected, found = (
        logits(AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32), ids) for one in (folder, back)
    )
    assert (expected - found).abs().max() < 0.02 * expected.std()
    assert expected.std() > 0.1
