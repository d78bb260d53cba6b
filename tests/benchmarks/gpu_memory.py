"""GPU memory of phase 2 by model size: arithmetic over the real shapes, nothing is loaded or measured.

Parts: linear weights of the layers in NF4 with double quantisation (4 bits, an 8-bit constant per 64 weights, an
fp32 one per 256 of those); embeddings, head and norms in 16 bits; adapters in fp32 with fp32 gradients and 8-bit
Adam; activations with checkpointing (one hidden state a layer, and about 50 hidden sizes a token while one layer
is recomputed); one chunk of logits in fp32.
"""

import json
import platform
import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from qcft.layers import adapted_modules

GIB = 2**30
RANK, TOKENS, LOGIT_TOKENS = 16, 1024, 256
OVERHEAD = 0.7  # GiB: the CUDA context and the allocator's slack


def llama(hidden, inner, layers, heads, kv, vocab, tied=False):
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, vocab_size=vocab, tie_word_embeddings=tied,
    )  # fmt: skip


MODELS = {
    "SmolLM2-135M": llama(576, 1536, 30, 9, 3, 49152, True),
    "Llama-3.2-1B": llama(2048, 8192, 16, 32, 8, 128256, True),
    "SmolLM2-1.7B": llama(2048, 8192, 24, 32, 32, 49152, True),
    "Llama-3.2-3B": llama(3072, 8192, 28, 24, 8, 128256, True),
    "Mistral-7B": MistralConfig(),
    "Qwen2.5-7B": Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
    ),
    "Llama-3-8B": llama(4096, 14336, 32, 32, 8, 128256),
}  # fmt: skip


def estimate(config, freeze: str) -> dict[str, float]:
    """GiB by part."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = dict(model.named_modules())
    linear = sum(modules[name].weight.numel() for name in adapted_modules(model, "all-linear", "none", 0))
    adapted = [modules[name] for name in adapted_modules(model, "all-linear", freeze, 0)]
    lora = sum(RANK * (m.in_features + m.out_features) for m in adapted)
    other = sum(p.numel() for p in model.parameters()) - linear
    hidden, layers = config.hidden_size, config.num_hidden_layers
    return {
        "weights": (linear * (4 + 8 / 64 + 32 / (64 * 256)) / 8 + other * 2) / GIB,
        "adapters": lora * (4 + 4 + 2) / GIB,
        "activations": TOKENS * hidden * (2 * layers + 50) / GIB,
        "logits": LOGIT_TOKENS * config.vocab_size * 4 * 3 / GIB,
    }


def main() -> None:
    freeze = sys.argv[1] if len(sys.argv) > 1 else "none"
    print(f"GiB; r={RANK}, {TOKENS} tokens a pass, freeze {freeze}, {OVERHEAD} GiB of overhead in the total")
    print("| model | weights | adapters | activations | logits | total |\n|---|---|---|---|---|---|")
    figures = {}
    for name, config in MODELS.items():
        parts = estimate(config, freeze)
        total = sum(parts.values()) + OVERHEAD
        print(f"| {name} | " + " | ".join(f"{v:.2f}" for v in parts.values()) + f" | {total:.1f} |")
        figures[name] = {"value": round(total, 2), "unit": "GiB, estimated", "goal": None, "met": None}
    print(json.dumps({"benchmark": "gpu_memory", "figures": figures, "machine": platform.platform()}))


if __name__ == "__main__":
    main()
