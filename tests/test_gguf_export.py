"""A model written as GGUF: read back with equal tokens and logits, its metadata as llama.cpp expects them."""

import json
from contextlib import closing

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qcft.errors import InputError, QcftError
from qcft.events import Watch
from qcft.models.gguf_tools import find_tools, quantize
from qcft.models.gguf_vocab import PRE_TOKENIZERS, add_tokenizer, check_tokenizer
from qcft.models.gguf_write import check_writable, write_gguf
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


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_each_type_reads_back_within_its_rounding(kind, tmp_path):
    folder = make(tmp_path / "model", "llama", split="gpt-2")
    file = write(folder, tmp_path / "out" / "tiny.gguf", kind)
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert types["token_embd.weight"] == types["blk.0.attn_q.weight"] == kind.upper()
    assert types["output_norm.weight"] == types["blk.0.attn_norm.weight"] == "F32"
    ids = torch.tensor([[5, 9, 100, 200, 300]])
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    found = logits(load_gguf(file, folder, Model(name=str(folder))), ids)
    assert (expected - found).std() < 0.05 * expected.std()


def test_rows_that_are_not_a_multiple_of_a_block_stay_in_16_bits(tmp_path):
    folder = make(tmp_path / "model", "llama", intermediate_size=40)
    file = write(folder, tmp_path / "out" / "tiny.gguf", "q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16"
    assert types["blk.0.ffn_up.weight"] == "Q8_0"


def test_scaled_rotary_embeddings_are_in_the_file(tmp_path):
    """Llama 3's as a tensor of factors, by the formula of llama.cpp's converter; others as metadata."""
    folder = make(tmp_path / "llama3", "llama", rope_parameters=LLAMA3_ROPE)
    file = write(folder, tmp_path / "out" / "tiny.gguf")
    (factors,) = [tensor.data for tensor in GGUFReader(file).tensors if tensor.name == "rope_freqs.weight"]
    long, short = (LLAMA3_ROPE["original_max_position_embeddings"] / factor for factor in (1.0, 4.0))
    expected = []
    for i in range(8):
        wave = 2 * torch.pi * LLAMA3_ROPE["rope_theta"] ** (2 * i / 16)
        smooth = (64 / wave - 1.0) / (4.0 - 1.0)
        expected.append(1.0 if wave < short else 8.0 if wave > long else 1 / ((1 - smooth) / 8.0 + smooth))
    assert factors.tolist() == pytest.approx(expected, rel=1e-5)
    assert len(set(expected)) > 2
    # What qcft reads back for measuring has the scaling, though transformers reads none from a file.
    ids = torch.arange(3, 203)[None]
    before = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), ids)
    assert torch.allclose(logits(load_gguf(file, folder, Model(name=str(folder))), ids), before, atol=0.1)
    events = []
    weights_folder(resolve(Model(name=str(file))), Watch(events.append))
    assert any("does not read how it scales its rotary embeddings" in event.text for event in events)
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    found = fields(write(make(tmp_path / "linear", "qwen2", rope_parameters=rope), tmp_path / "out" / "two.gguf"))
    assert (found["qwen2.rope.scaling.type"], found["qwen2.rope.scaling.factor"]) == ("linear", 4.0)


def test_the_metadata_are_llama_cpps(tmp_path):
    folder = make(tmp_path / "model", "gemma3_text")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 1]}))
    found = fields(write(folder, tmp_path / "out" / "tiny.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == SMALL["vocab_size"]
    assert tokens[-1] == f"[PAD{SMALL['vocab_size'] - 1}]"
    kinds = dict(zip(tokens, types, strict=True))
    assert (kinds["<|im_end|>"], kinds["<0x0A>"], kinds["<unk>"], kinds["▁the"], types[-1]) == (3, 6, 2, 1, 5)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id == 3
    assert found["tokenizer.ggml.eot_token_id"] == 1
    assert found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.add_space_prefix"] is False
    assert found["gemma3.attention.sliding_window"] == 16
    assert found["gemma3.rope.freq_base_swa"] == 10000.0
    assert found["general.file_type"] == 1
    old = fields(write(make(tmp_path / "old", "llama", "old"), tmp_path / "out" / "old.gguf"))
    assert old["tokenizer.ggml.add_space_prefix"] is True


@pytest.mark.parametrize("split", PRE_TOKENIZERS.values())
def test_how_a_tokenizer_splits_text_is_named(split, tmp_path):
    give_tokenizer(tmp_path, split)
    writer = GGUFWriter(tmp_path / "unused.gguf", "llama")
    add_tokenizer(writer, AutoTokenizer.from_pretrained(tmp_path), 1200, [])
    expected = {"llama-bpe": "smaug-bpe"}.get(split, split)  # the same splits, of a tokenizer that merges all words
    assert writer.kv_data[0]["tokenizer.ggml.pre"].value == expected


REFUSED = {
    "another activation": ("llama", {"hidden_act": "gelu"}, "the activation gelu"),
    "dynamic rotary embeddings": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "of the type dynamic",
    ),
    "a part of each head": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "on a part of each head",
    ),
    "biases": ("qwen3", {"attention_bias": True}, "biases in attention"),
    "another scale": ("gemma3_text", {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar 16"),
    "another order of layers": ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "another order"),
    "another family": ("olmo2", {}, "not olmo2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_gguf_has_no_place_for_is_refused(case, tmp_path):
    from transformers import CONFIG_MAPPING

    kind, options, says = REFUSED[case]
    CONFIG_MAPPING[kind](**{**SMALL, **SHAPES.get(kind, {}), **options}).save_pretrained(tmp_path)
    give_tokenizer(tmp_path, "gpt-2")
    with pytest.raises(InputError, match="--gguf: ") as refused:
        check_writable(tmp_path, Model(name=str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path))
    assert says in refused.value.message


def test_tokenizers_that_gguf_has_no_words_for_are_refused(tmp_path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    word = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    make_words(tmp_path)
    lower, digits = (Tokenizer.from_file(str(tmp_path / "tokenizer.json")) for _ in range(2))
    lower.normalizer = normalizers.Lowercase()
    digits.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), digits.pre_tokenizer])
    for made, says in ((word, "WordLevel"), (lower, "Lowercase"), (digits, "Punctuation")):
        with pytest.raises(InputError, match=says):
            check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=made))


def test_a_number_beyond_16_bits_is_refused_and_a_window_is_reported(tmp_path):
    folder = make(tmp_path / "model", "mistral", sliding_window=64)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"][5, 5] = 1e5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    events = []
    with pytest.raises(QcftError, match=r"blk.3.ffn_up.weight has values beyond 65,504"):
        write_gguf(folder, tmp_path / "x.gguf", "f16", "x", Model(name=str(folder)), Watch(events.append))
    assert "the last 64 only" in events[0].text
    write(folder, tmp_path / "out" / "x.gguf", "bf16")


def test_a_weight_without_a_name_is_refused(tmp_path):
    folder = make(tmp_path / "model", "qwen3")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "model.layers.0.extra.weight": torch.ones(4)}, folder / "model.safetensors")
    with pytest.raises(QcftError, match=r"no name for the weight model.layers.0.extra.weight"):
        write_gguf(folder, tmp_path / "x.gguf", "f16", "x", Model(name=str(folder)), Watch())


@pytest.mark.llama
@pytest.mark.parametrize("kind", [*SHAPES, "llama3"])
def test_llama_cpp_has_the_tokens_and_greedy_answers_of_transformers(kind, tmp_path):
    """Five prompts; F16 in llama.cpp, 32 bits in transformers. Where two tokens of a random model are as good as equal,
    rounding may choose."""
    llama_cpp = pytest.importorskip("llama_cpp")
    options = {"rope_parameters": LLAMA3_ROPE} if kind == "llama3" else {}
    folder = make(tmp_path / "model", "llama" if kind == "llama3" else kind, **options)
    file = write(folder, tmp_path / "out" / "tiny.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chosen = 0
    with closing(llama_cpp.Llama(str(file), n_ctx=256, n_threads=1, verbose=False, logits_all=True)) as theirs:
        for text in [*TEXTS, "Name three colors.", "¿Qué hora es? It is 12:45."]:
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
            assert theirs.tokenize(prompt.encode(), add_bos=False, special=True) == ids
            with torch.no_grad():
                whole = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=None)
            theirs.reset()
            theirs.eval(whole[0].tolist())
            found, expected = torch.tensor(theirs.scores[: whole.shape[1]]), logits(model, whole)[0]
            assert (found - expected).abs().max() < 0.01 * expected.std()
            best = expected.topk(2).values
            clear = (best[:, 0] - best[:, 1] > 0.02 * expected.std())[len(ids) - 1 : -1]
            assert torch.equal(found.argmax(-1)[len(ids) - 1 : -1][clear], whole[0, len(ids) :][clear])
            chosen += int(clear.sum())
    assert chosen > 40  # of 80


@pytest.mark.llama
def test_llama_cpps_quantizer_writes_q4_k_m(tmp_path):
    pytest.importorskip("llama_cpp")
    folder = make(tmp_path / "model", "llama", hidden_size=256, intermediate_size=512)
    source = write(folder, tmp_path / "out" / "tiny.gguf", "bf16")
    quantize(find_tools(None), source, tmp_path / "out" / "four.gguf", Watch())
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "out" / "four.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == "Q4_K"
    ids = torch.tensor([[5, 9, 100, 200, 300]])
    expected = logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), ids)
    found = logits(load_gguf(tmp_path / "out" / "four.gguf", folder, Model(name=str(folder))), ids)
    assert 0.001 < (expected - found).std() / expected.std() < 0.6
