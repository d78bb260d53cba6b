"""The memory of training, estimated and measured.

    python tests/benchmarks/memory.py [NAME...]       on a CPU: SmolLM2-135M in eight configurations
    python tests/benchmarks/memory.py --shapes [NAME...]   1B to 8B: on a GPU measured too, with random weights

On a CPU: the resident set of a new process, minus its size after all imports. The estimate is `qcft check`'s, from
shapes, and on a CPU half a GiB for freed blocks that glibc does not return (MALLOC_MMAP_THRESHOLD_=131072 returns them,
but takes twice the time): that value was fitted to the first six configurations, the last two were added later. On a
GPU: PyTorch's `max_memory_allocated` in the training step.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from qcft.recipe import recipe_from

GIB = 2**30
WITHIN = 0.15
PHASE = {"data": [{"path": "qcft:instructions/en", "take": 64, "lang": "en"}], "name": "phase1"}
PHASE["train"] = {"steps": 2, "batch": 16, "max_length": 1024, "prefix_cache": False, "checkpoint_steps": 100}
CONFIGURATIONS = {
    "packs of 1,024 tokens": {},
    "recomputing activations": {"phase1.train.gradient_checkpointing": True},
    "first:20 frozen": {"phase1.freeze": "first:20"},
    "first:20 frozen, from stored states": {"phase1.freeze": "first:20", "phase1.train.prefix_cache": True},
    "16 bits, packs of 512 tokens": {"model.quantize": "none", "phase1.train.max_length": 512},
    "4 rows padded, rank 64": {"phase1.train.packing": False, "lora.r": 64},
    "4 rows a step": {"phase1.train.batch": 4},
    "4 rows a step, recomputing": {"phase1.train.batch": 4, "phase1.train.gradient_checkpointing": True},
}
SHAPES = {  # hidden, inner, layers, heads, key-value heads, vocabulary, tied
    "Llama-3.2-1B": ("llama", 2048, 8192, 16, 32, 8, 128256, True),
    "SmolLM2-1.7B": ("llama", 2048, 8192, 24, 32, 32, 49152, True),
    "Llama-3.2-3B": ("llama", 3072, 8192, 28, 24, 8, 128256, True),
    "Mistral-7B": ("mistral", 4096, 14336, 32, 32, 8, 32768, False),
    "Qwen2.5-7B": ("qwen2", 3584, 18944, 28, 28, 4, 152064, False),
    "Llama-3-8B": ("llama", 4096, 14336, 32, 32, 8, 128256, False),
}


def recipe(changes, model="smollm2-135m-instruct"):
    return recipe_from({"name": "memory", "model": {"name": model}, "phases": [PHASE]}, changes)


def estimated(changes, model, where):
    """Bytes by part."""
    from qcft.events import Watch
    from qcft.prepare.prepared import Prepared
    from qcft.runner.forecast import plan_phase

    made = recipe(changes, model)
    planned, _ = plan_phase(Prepared(made, Watch()), made.phases[0], where, 1 << 50)
    return {**vars(planned.memory), "total": planned.memory.total}


def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def measured(changes, model):
    """Bytes at the peak of the training, in this process."""
    import torch
    import trl.trainer.sft_trainer  # noqa: F401 (loaded, so that it is not counted)

    import qcft.steps.train  # noqa: F401
    from qcft.events import Watch
    from qcft.runner.recipe import run_recipe

    before = status("VmRSS")
    with tempfile.TemporaryDirectory() as place:
        run = run_recipe(recipe(changes, model), Path(place), Watch(), up_to="phase1")
    if torch.cuda.is_available():
        return run.stages["phase1"].metrics["peak_GPU_bytes"]
    return status("VmHWM") - before


def in_a_process(what, changes, model, where):
    command = [sys.executable, __file__, "--child", what, json.dumps(changes), model, where]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def make_model(shape, folder, weights):
    """A model of a known shape with random weights, or without any, and a small tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    from qcft.data.template import CHATML

    kind, hidden, inner, layers, heads, shared, words, tied = shape
    config = AutoConfig.for_model(
        kind, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=shared, vocab_size=words, tie_word_embeddings=tied,
    )  # fmt: skip
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    letters |= {"<|im_start|>": 256, "<|im_end|>": 257}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    fast.chat_template = CHATML.replace("END", "<|im_end|>")
    fast.save_pretrained(folder)
    if weights:
        with torch.device("cuda"):
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    else:
        from safetensors.torch import save_file

        config.save_pretrained(folder)
        save_file({"none": torch.zeros(1)}, folder / "model.safetensors")  # only shapes are read


def on_the_cpu(names):
    print("| configuration | estimated | measured | off |\n|---|---|---|---|")
    for name in names or CONFIGURATIONS:
        arguments = (CONFIGURATIONS[name], "smollm2-135m-instruct", "cpu")
        yield compared(name, in_a_process("estimate", *arguments), in_a_process("measure", *arguments))


def on_a_gpu(names):
    """Print the table of shapes; without a GPU only estimates."""
    import torch

    there = torch.cuda.is_available()
    print("| model | " + " | ".join(("estimated", "measured", "off") if there else PARTS) + " |")
    print("|---" * (4 if there else 1 + len(PARTS)) + "|")
    for name in names or SHAPES:
        with tempfile.TemporaryDirectory() as place:
            make_model(SHAPES[name], Path(place), there)
            changes = {"phase1.train.gradient_checkpointing": True}
            estimate = in_a_process("estimate", changes, place, "cuda")
            if there:
                yield compared(name, estimate, in_a_process("measure", changes, place, "cuda"))
                continue
        parts = [sum(estimate[key] for key in keys) / GIB for keys in PARTS.values()]
        print(f"| {name} | " + " | ".join(f"{part:.2f}" for part in parts) + " |", flush=True)
        yield name, {"value": round(parts[-1], 2), "unit": "GiB, estimated", "goal": None, "met": None}


PARTS = {
    "weights": ("weights", "constants", "halves"),
    "adapters": ("adapters", "gradients", "optimizer"),
    "activations": ("activations",),
    "logits": ("logits",),
    "total": ("total",),
}


def compared(name, estimate, measure):
    off = estimate["total"] / measure - 1
    print(f"| {name} | {estimate['total'] / GIB:.2f} GiB | {measure / GIB:.2f} GiB | {off:+.0%} |", flush=True)
    return name, {"value": round(off, 3), "unit": "of measured", "goal": WITHIN, "met": abs(off) <= WITHIN}


def main():
    if sys.argv[1:2] == ["--child"]:
        what, changes, model, where = sys.argv[2:]
        found = (
            estimated(json.loads(changes), model, where) if what == "estimate" else measured(json.loads(changes), model)
        )
        print(json.dumps(found))
        return
    names = [name for name in sys.argv[1:] if name != "--shapes"]
    figures = dict(on_a_gpu(names) if "--shapes" in sys.argv else on_the_cpu(names))
    print(json.dumps({"benchmark": "memory", "figures": figures, "machine": platform.platform()}))


if __name__ == "__main__":
    main()
