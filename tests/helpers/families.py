"""Tiny random models of many families, text ones and multimodal wrappers, with a small ChatML tokenizer.

Configs have the shapes of those that people download (lists of end tokens, nested text configs, no padding token), made
smaller. Every parameter is given a value that matters (norms, biases, sinks), so that a wrong merge, or rows that see
each other, show in the logits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[2] / "recipes"
WORDS = 1200
SIZES = {
    "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048, "initializer_range": 0.08,
    "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0, "moe_intermediate_size": 48, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "n_routed_experts": 4,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
THREE_TO_ONE = ["sliding_attention"] * 3 + ["full_attention"]
LINEAR = ["linear_attention"] * 3 + ["full_attention"]
DELTA = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4, "layer_types": LINEAR,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1}
LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8,
}  # fmt: skip
GLM_MOE = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

# Family -> model type and what differs from SIZES; None takes a size away.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # As Llama 3.1, 3.2 and 3.3 Instruct have it: three end tokens, no padding token.
    "llama3": ("llama", {"eos_token_id": [1, 2, 0], "pad_token_id": None, "rope_parameters": LLAMA3_ROPE}),
    "llama": ("llama", {}),
    "llama_dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 64},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_window": ("mistral", {"sliding_window": 24}),
    "ministral3": ("ministral3", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False, "pad_token_id": -1}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "pad_token_id": 5000}),
    "qwen3_5": ("qwen3_5_text", {"tie_word_embeddings": True, "partial_rotary_factor": 0.25, **DELTA}),
    "qwen2_moe": ("qwen2_moe", {"shared_expert_intermediate_size": 48, "decoder_sparse_step": 1}),
    "qwen3_moe": ("qwen3_moe", {"decoder_sparse_step": 1, "norm_topk_prob": True}),
    "qwen3_next": ("qwen3_next", {"shared_expert_intermediate_size": 48, "partial_rotary_factor": 0.25, **DELTA}),
    "gemma": ("gemma", {}),
    "gemma2": (
        "gemma2",
        {
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 5.0,
        },
    ),
    "gemma3": ("gemma3_text", {"sliding_window": 24, "query_pre_attn_scalar": 16, "layer_types": THREE_TO_ONE}),
    "gemma4": (
        "gemma4_text",
        {
            "global_head_dim": 16,
            "num_global_key_value_heads": None,
            "vocab_size_per_layer_input": WORDS,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "sliding_window": 24,
            "layer_types": THREE_TO_ONE,
        },
    ),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi4": ("phi3", {"sliding_window": None, "eos_token_id": [2, 1]}),
    "phimoe": ("phimoe", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 24}),
    "olmoe": ("olmoe", {}),
    "olmo_hybrid": (
        "olmo_hybrid",
        {
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "layer_types": LINEAR,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
    "granite": (
        "granite",
        {
            "logits_scaling": 4.0,
            "embedding_multiplier": 6.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.1,
        },
    ),
    "granitemoe": ("granitemoe", {"logits_scaling": 4.0}),
    "granite4": (
        "granitemoehybrid",
        {
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "layer_types": ["attention"] * 4,
            "shared_intermediate_size": 96,
            "logits_scaling": 4.0,
            "position_embedding_type": "rope",
            **MAMBA,
        },
    ),
    "granite4_h": (
        "granitemoehybrid",
        {
            "layer_types": ["mamba"] * 3 + ["attention"],
            "shared_intermediate_size": 48,
            "logits_scaling": 4.0,
            "position_embedding_type": "nope",
            **MAMBA,
        },
    ),
    "falcon": ("falcon", {"head_dim": None, "new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "falcon_h1": (
        "falcon_h1",
        {
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "lm_head_multiplier": 0.3,
        },
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 4, "n_head": 4}),
    "gptj": ("gptj", {"n_embd": 64, "n_layer": 4, "n_head": 4, "rotary_dim": 8}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "bloom": ("bloom", {"n_layer": 4, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 64, "n_heads": 4, "n_layers": 4, "max_seq_len": 2048}),
    "xglm": ("xglm", {"d_model": 64, "num_layers": 4, "ffn_dim": 96, "attention_heads": 4}),
    "biogpt": ("biogpt", {}),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "gpt_oss": ("gpt_oss", {"sliding_window": 24}),
    "cohere": ("cohere", {"logit_scale": 0.2}),
    "cohere2": ("cohere2", {"logit_scale": 0.2, "sliding_window": 24}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {}),
    "exaone4": ("exaone4", {"sliding_window": 24, "layer_types": THREE_TO_ONE}),
    "minicpm3": (
        "minicpm3",
        {**{k: LATENT[k] for k in list(LATENT)[:5]}, "head_dim": 8, "num_key_value_heads": 4, "dim_model_base": 16},
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_ff_dim": 96}),
    "bamba": ("bamba", {"attn_layer_indices": [3], **{k: v for k, v in MAMBA.items() if k != "mamba_expand"}}),
    "jamba": (
        "jamba",
        {
            "mamba_d_state": 8,
            "attn_layer_period": 4,
            "attn_layer_offset": 3,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "nemotron_h": ("nemotron_h", {}),
    "mamba": ("mamba", {"state_size": 8}),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"lru_width": 64, "attention_window_size": 24, "logits_soft_cap": 3.0},
    ),
    "glm4": ("glm4", {}),
    "glm4_moe": ("glm4_moe", GLM_MOE),
    "deepseek_v2": ("deepseek_v2", LATENT),
    "deepseek_v3": ("deepseek_v3", LATENT),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2}),
    "hunyuan": ("hunyuan_v1_dense", {}),
    "hunyuan_moe": ("hunyuan_v1_moe", {"moe_topk": 2}),
    "exaone_moe": ("exaone_moe", GLM_MOE),
    "afmoe": ("afmoe", {"num_dense_layers": 1, "sliding_window": 24}),
    "solar_open": ("solar_open", {}),
    "minimax": ("minimax", {}),
    "seed_oss": ("seed_oss", {}),
    "arcee": ("arcee", {}),
    "apertus": ("apertus", {}),
    "helium": ("helium", {}),
    "nemotron": ("nemotron", {}),
}


def _text(**more: Any) -> dict[str, Any]:
    return {**{key: value for key, value in SIZES.items() if "expert" not in key and "moe" not in key}, **more}


def _gemma3(encoder_layers: int = 3) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = _text(sliding_window=24, query_pre_attn_scalar=16, layer_types=THREE_TO_ONE)
    config = Gemma3Config(
        text_config=text, vision_config={**VISION, "num_hidden_layers": encoder_layers}, mm_tokens_per_image=4,
        image_token_index=3, boi_token_index=4, eoi_token_index=5, eos_token_id=[2, 1], initializer_range=0.08,
    )  # fmt: skip
    return Gemma3ForConditionalGeneration(config)


def _gemma4(encoder_layers: int = 3) -> Any:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    text = _text(
        sliding_window=24, layer_types=THREE_TO_ONE, global_head_dim=16, vocab_size_per_layer_input=WORDS,
        hidden_size_per_layer_input=8, final_logit_softcapping=5.0,
    )  # fmt: skip
    vision = {k: VISION[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads")} | {
        "num_hidden_layers": encoder_layers,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    audio = {"hidden_size": 32, "num_hidden_layers": encoder_layers, "num_attention_heads": 2, "output_proj_dims": 32}
    config = Gemma4Config(
        text_config=text, vision_config=vision, audio_config=audio, image_token_id=3, boi_token_id=4, eoi_token_id=5,
        audio_token_id=6, boa_token_id=7, eoa_token_id=8, video_token_id=9, initializer_range=0.08,
    )  # fmt: skip
    return Gemma4ForConditionalGeneration(config)


def _qwen35() -> Any:
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
        "spatial_merge_size": 2, "num_position_embeddings": 16,
    }  # fmt: skip
    config = Qwen3_5Config(
        text_config=_text(**DELTA, tie_word_embeddings=True, rope_parameters=rope), vision_config=vision,
        image_token_id=3, video_token_id=6, vision_start_token_id=4, vision_end_token_id=5, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3_5ForConditionalGeneration(config)


def _qwen3_vl() -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision = {
        "depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
        "spatial_merge_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=_text(rope_parameters=rope), vision_config=vision, image_token_id=3, video_token_id=6,
        vision_start_token_id=4, vision_end_token_id=5,
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration(config)


def _mistral3(text_type: str) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        text_config=_text(model_type=text_type, **({"sliding_window": None} if text_type == "mistral" else {})),
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 16}, image_token_index=3, spatial_merge_size=1,
    )  # fmt: skip
    return Mistral3ForConditionalGeneration(config)


def _llama4() -> Any:
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    text = _text(
        intermediate_size_mlp=96, attention_chunk_size=32, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=2,
    )  # fmt: skip
    vision = {**VISION, "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}
    return Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=vision, image_token_index=3))


WRAPPERS: dict[str, Callable[[], Any]] = {
    "gemma3_wrapper": _gemma3,
    "gemma3_wrapper_same_depth": lambda: _gemma3(4),
    "gemma4_wrapper": _gemma4,
    "gemma4_wrapper_same_depth": lambda: _gemma4(4),
    "qwen3_5_wrapper": _qwen35,
    "qwen3_vl_wrapper": _qwen3_vl,
    "mistral3_wrapper": lambda: _mistral3("mistral"),
    "ministral3_wrapper": lambda: _mistral3("ministral3"),
    "llama4_wrapper": _llama4,
}


def make_family(name: str, folder: Path) -> Path:
    """A tiny model of a family in `folder`, in bf16, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    padding = None
    if name in WRAPPERS:
        model = WRAPPERS[name]()
    else:
        config = _config(name)
        padding, config.pad_token_id = config.pad_token_id, None  # what no embedding can be built with
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() == 1 and "A_log" not in key and "dt_bias" not in key:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    model.to(torch.bfloat16).save_pretrained(folder)
    if padding is not None:
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**raw, "pad_token_id": padding}))
    make_words(folder)
    return folder


def _config(name: str) -> Any:
    from transformers import CONFIG_MAPPING

    kind, changes = FAMILIES[name]
    made = CONFIG_MAPPING[kind]
    default, renamed = made(), getattr(made, "attribute_map", {})
    sizes = {key: size for key, size in SIZES.items() if key in default.to_dict() or key in renamed}
    both = {**sizes, **changes}
    return made(
        **{key: value for key, value in both.items() if value is not None or key not in sizes or key == "pad_token_id"}
    )


def make_words(folder: Path) -> None:
    """A byte-level BPE tokenizer of the shipped instructions' words, with ChatML's tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from qcft.data.template import CHATML

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<boi>", "<eoi>", "<a>", "<b>", "<c>", "<d>"]
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    texts = []
    for file in sorted((RECIPES / "data" / "instructions").glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        texts += [row[part] for row in rows for part in ("instruction", "output")]
    made.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", bos_token="<|endoftext|>")
    fast.chat_template = CHATML.replace("END", "<|im_end|>")
    fast.save_pretrained(folder)
