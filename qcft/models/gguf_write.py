"""Writing a model's folder as one GGUF file, tensor by tensor, with the layout of llama.cpp's own converter.

Anything that the format cannot hold is refused, and so is a weight with an unknown name: nothing is dropped silently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from qcft.errors import InputError, QcftError
from qcft.events import Watch
from qcft.files import read_json
from qcft.models.gguf_vocab import add_tokenizer, check_tokenizer
from qcft.models.meta import read_config
from qcft.models.tensors import StoredTensor, stored_weights
from qcft.private import private
from qcft.recipe import Model

if TYPE_CHECKING:
    import numpy as np
    import torch
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

GgufType = Literal["f16", "bf16", "q8_0", "q4_k_m"]
TYPES: tuple[str, ...] = get_args(GgufType)
# The supported families, by the `model_type` of their config, and the name of their architecture in GGUF.
FAMILIES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3",
}  # fmt: skip
CONVERTER = "convert_hf_to_gguf.py"
BLOCK = 1 << 24  # numbers quantised at a time
LARGEST_F16 = 65504.0
TEXT = re.compile(r"^(model\.language_model\.|language_model\.model\.)")  # in a model that also takes images
IMAGES = re.compile(r"^(model\.)?(vision_tower|multi_modal_projector)\.")
YARN = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"}


@dataclass(frozen=True)
class _Tensor:
    """A weight of the file: where it comes from and its type; `heads`: how many, where its rows are reordered."""

    name: str
    stored: StoredTensor
    kind: Any  # gguf.GGMLQuantizationType
    heads: int | None
    shift: float


def check_writable(folder: Path, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError for a model that this module cannot write, by its config and its tokenizer alone."""
    config = read_config(folder, model).get_text_config()
    if config.model_type not in FAMILIES:
        raise InputError(
            f"--gguf: qcft writes {', '.join(FAMILIES)} as GGUF, not {config.model_type}",
            f"name the folder of llama.cpp's converter with --llama-cpp, or export without --gguf and run "
            f"`{CONVERTER} DIR`",
        )
    for has, what in _beyond(config):
        if has:
            raise InputError(
                f"--gguf: the model has {what}, which GGUF's {FAMILIES[config.model_type]} does not support",
                "export it without --gguf: transformers and vLLM load that folder",
            )
    check_tokenizer(tokenizer)


def write_gguf(folder: Path, file: Path, kind: str, name: str, model: Model, watch: Watch) -> None:
    """Write a model's folder as a GGUF file of type `kind`: f16, bf16 or q8_0.

    Weights of one dimension are in 32 bits, and in q8_0 those whose row size is not a multiple of 32 in 16. Raises
    InputError as `check_writable` does, QcftError for a weight that cannot be written.
    """
    import gguf
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_writable(folder, model, tokenizer)
    config = read_config(folder, model).get_text_config()
    tensors = list(_tensors(folder, config, kind, watch))
    (rows,) = {one.stored.shape[0] for one in tensors if one.name == "token_embd.weight"}
    window = getattr(config, "sliding_window", None)
    if window and window < config.max_position_embeddings and config.model_type != "gemma3_text":
        watch.note(f"llama.cpp attends to all earlier tokens, this model to the last {window:,} only", "warning")
    writer = gguf.GGUFWriter(file, FAMILIES[config.model_type])
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_vocab_size(rows)
        _add_sizes(writer, config)
        _add_rotary(writer, config)
        ends = (read_json(folder / "generation_config.json") or {}).get("eos_token_id")
        add_tokenizer(writer, tokenizer, rows, ends if isinstance(ends, list) else [])
        factors = _rotary_factors(config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for one in tensors:
            _announce(writer, one)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for done, one in enumerate(tensors):
            watch.progress(f"writing {file.name}", done, len(tensors), "weights")
            writer.write_tensor_data(_packed(one))
    finally:
        writer.close()


def _beyond(config: PreTrainedConfig) -> Iterator[tuple[bool, str]]:
    """Assumptions of llama.cpp's code for these architectures: whether the config differs, and the value it has."""
    rope = _rope(config)
    gemma = config.model_type == "gemma3_text"
    act = config.hidden_activation if gemma else config.hidden_act
    yield act != ("gelu_pytorch_tanh" if gemma else "silu"), f"the activation {act}"
    kind = rope["rope_type"]
    known = {"default", "linear", "yarn"} | ({"llama3"} if FAMILIES[config.model_type] == "llama" else set())
    yield kind not in known, f"rotary embeddings of the type {kind}"
    yield kind == "yarn" and bool({k for k, v in rope.items() if v is not None} - YARN), "more than YaRN's usual keys"
    yield rope.get("partial_rotary_factor", 1.0) != 1.0, "rotary embeddings on a part of each head"
    yield config.model_type in {"qwen3", "gemma3_text"} and config.attention_bias, "biases in attention"
    if gemma:
        heads = config.hidden_size // config.num_attention_heads
        scale = heads if config.num_hidden_layers == 62 else config.head_dim  # 62 layers: Gemma 3 27B
        pattern = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(config.num_hidden_layers)]
        yield config.query_pre_attn_scalar != scale, f"query_pre_attn_scalar {config.query_pre_attn_scalar}"
        yield config.layer_types != pattern, "another order of local and global layers than five to one"
        yield config.attn_logit_softcapping is not None, "attention logits that are capped"
        yield bool(config.use_bidirectional_attention), "attention to later tokens"
        local = config.rope_parameters["sliding_attention"]["rope_type"]
        yield local != "default", f"local rotary embeddings of the type {local}"


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of the rotary embeddings; of Gemma 3 those of its global layers."""
    found: dict[str, Any] = config.rope_parameters.get("full_attention", config.rope_parameters)
    return found


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _add_sizes(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _add_rotary(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    from gguf import RopeScalingType

    rope = _rope(config)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type == "gemma3_text":
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    if rope["rope_type"] in {"linear", "yarn"}:
        writer.add_rope_scaling_type(RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
        for key in ("beta_fast", "beta_slow"):
            if rope.get(key) is not None:
                getattr(writer, f"add_rope_scaling_yarn_{key}")(rope[key])


def _rotary_factors(config: PreTrainedConfig) -> np.ndarray | None:
    """The factors by which Llama 3's scaling divides the rotary frequencies; None without such scaling."""
    import torch

    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    scaled, _ = private("transformers.modeling_rope_utils:ROPE_INIT_FUNCTIONS")["llama3"](config, torch.device("cpu"))
    dim = _head_dim(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    factors: np.ndarray = (plain / scaled).numpy()
    return factors


def _tensors(folder: Path, config: PreTrainedConfig, kind: str, watch: Watch) -> Iterator[_Tensor]:
    """The weights with their names in the file. Raises QcftError for a weight without one."""
    import gguf

    arch = FAMILIES[config.model_type]
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if arch == "llama" else {}
    images = 0
    for stored_name, stored in stored_weights(folder).items():
        if IMAGES.match(stored_name):
            images += 1
            continue
        name = TEXT.sub("model.", stored_name).removeprefix("language_model.")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # the same numbers as the embedding
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise QcftError(f"--gguf: {arch} has no name for the weight {stored_name}", f"try llama.cpp's {CONVERTER}")
        shift = 1.0 if arch == "gemma3" and name.endswith("norm.weight") else 0.0  # Gemma's norms multiply by 1 + w
        packed = gguf.GGMLQuantizationType[kind.upper() if len(stored.shape) > 1 else "F32"]
        if packed == gguf.GGMLQuantizationType.Q8_0 and stored.shape[-1] % 32:
            packed = gguf.GGMLQuantizationType.F16
        yield _Tensor(found, stored, packed, heads.get(name.split(".")[-2]), shift)
    if images:
        watch.note(
            f"the GGUF file has the text part only: {images} weights of the image encoder are dropped", "warning"
        )


def _announce(writer: GGUFWriter, one: _Tensor) -> None:
    import gguf
    import numpy as np

    if one.kind in {gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16}:
        dtype = np.dtype(np.float32 if one.kind == gguf.GGMLQuantizationType.F32 else np.float16)
        writer.add_tensor_info(one.name, one.stored.shape, dtype, prod(one.stored.shape) * dtype.itemsize)
    else:
        shape = gguf.quant_shape_to_byte_shape(one.stored.shape, one.kind)
        writer.add_tensor_info(one.name, shape, np.dtype(np.uint8), prod(shape), one.kind)


def _packed(one: _Tensor) -> np.ndarray:
    """A weight's values as stored in the file. Raises QcftError for values beyond the range of F16."""
    import gguf
    import numpy as np

    tensor: Any = one.stored.read()
    if one.heads:
        tensor = _paired(tensor, one.heads)
    rows = max(1, BLOCK // max(1, prod(tensor.shape[1:])))
    parts = []
    for part in tensor.split(rows):
        numbers = part.float().numpy() + np.float32(one.shift)
        if one.kind == gguf.GGMLQuantizationType.F16 and abs(numbers).max() > LARGEST_F16:
            raise QcftError(f"--gguf: {one.name} has values beyond {LARGEST_F16:,.0f}, the largest in F16", "use bf16")
        parts.append(gguf.quants.quantize(numbers, one.kind))
    return np.concatenate(parts)


def _paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a query or key projection (or its bias) in llama.cpp's order: its rotary embeddings rotate
    neighbouring rows of a head together, those of transformers rows of its two halves."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)
