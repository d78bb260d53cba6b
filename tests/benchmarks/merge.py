"""Merging an adapter by streaming, compared with PEFT's load-and-merge and with copying the files.

    python tests/benchmarks/merge.py [--repeats 3] [--gigabytes 3] [--place DIR]

Two models: the embedded SmolLM2-135M, and a random Llama of about 3 GB in 6 shards. Each way runs in its own process,
in turn, after a warm-up. Peak memory is the process's, minus its memory after the libraries were loaded; time starts
there too. Results: peak memory compared with 1.2 times (a shard of 1 GB and the largest tensor in fp32), and time
compared with copying the files.
"""

import argparse
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WAYS = ("qcft", "peft", "copy")
SHARD = 10**9


def peak_and_now() -> tuple[int, int]:
    """The process's peak and current resident memory in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak, peak
    found = dict(line.split(":", 1) for line in status.read_text().splitlines() if line.startswith("Vm"))
    return tuple(int(found[key].split()[0]) * 1024 for key in ("VmHWM", "VmRSS"))


def forget_peak() -> None:
    """Reset the peak, if the system can."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")


def work(way: str, base: Path, adapter: Path, to: Path) -> None:
    """One way, in this process; prints seconds and bytes."""
    import torch
    import transformers
    from peft import PeftModel

    from qcft.events import Watch
    from qcft.models.adapter_config import read_adapter_config  # noqa: F401 (loaded before time begins)
    from qcft.models.merge import merge_adapters

    transformers.logging.set_verbosity_error()
    torch.ones(8, 8) @ torch.ones(8, 8)
    to.mkdir()
    forget_peak()
    before = peak_and_now()[1]
    begun = time.monotonic()
    if way == "qcft":
        merge_adapters(base, [adapter], to, Watch())
    elif way == "copy":
        for file in base.iterdir():
            shutil.copyfile(file, to / file.name)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(to, max_shard_size="1GB")
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(to)
    print(json.dumps({"seconds": time.monotonic() - begun, "peak": max(0, peak_and_now()[0] - before)}))


def make(folder: Path, gigabytes: float) -> None:
    """Make the two models' folders and an adapter for each."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, LlamaConfig

    from qcft.events import Watch
    from qcft.models.meta import model_without_weights
    from qcft.models.sources import resolve, weights_folder
    from qcft.models.tensors import PlannedTensor, stored_weights, write_bytes, write_tensors
    from qcft.recipe import Model

    small = weights_folder(resolve(Model(name="smollm2-135m-instruct")), Watch())
    shutil.copytree(small, folder / "SmolLM2-135M")
    large = folder / "random Llama"
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * 32000 * 2048) / (4 * 2048**2 + 3 * 2048 * 5632)))
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=32000, **sizes, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(large)
    AutoTokenizer.from_pretrained(small).save_pretrained(large)
    tensors = [
        PlannedTensor(name, "BF16", tuple(t.shape))
        for name, t in model_without_weights(large, Model(name=str(large))).state_dict().items()
    ]
    size, parts, held = sum(t.size for t in tensors), [[]], 0
    for tensor in tensors:
        if held >= size / 6 * len(parts) and len(parts) < 6:
            parts.append([])
        parts[-1].append(tensor)
        held += tensor.size
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    generator = torch.Generator().manual_seed(0)
    for name, part in zip(names, parts, strict=True):
        write_tensors(
            large / name,
            part,
            lambda t, out: write_bytes((torch.randn(t.shape, generator=generator) * 0.02).bfloat16(), out),
        )
    weight_map = {t.name: name for name, part in zip(names, parts, strict=True) for t in part}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (large / "model.safetensors.index.json").write_text(json.dumps(index))
    for base in (folder / "SmolLM2-135M", large):
        adapter = folder / f"{base.name} adapter"
        adapter.mkdir()
        factors = {}
        for name, stored in stored_weights(base).items():
            if "_proj" in name:
                module = "base_model.model." + name.removesuffix(".weight")
                rows, columns = stored.shape
                factors[f"{module}.lora_A.weight"] = torch.randn(16, columns, generator=generator) * 0.02
                factors[f"{module}.lora_B.weight"] = torch.randn(rows, 16, generator=generator) * 0.02
        save_file(factors, adapter / "adapter_model.safetensors")
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        settings = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": targets, "task_type": "CAUSAL_LM"}
        (adapter / "adapter_config.json").write_text(json.dumps(settings))


def largest(folder: Path) -> int:
    """The number of values of a model's largest tensor."""
    from qcft.models.tensors import stored_weights

    return max(math.prod(stored.shape) for stored in stored_weights(folder).values())


def same(a: Path, b: Path) -> float:
    """The largest relative difference of two merges, over all tensors."""
    from qcft.models.tensors import stored_weights

    one, two = stored_weights(a), stored_weights(b)
    return max(
        float((one[n].read().float() - two[n].read().float()).norm() / two[n].read().float().norm()) for n in one
    )


def child(*arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, env={**os.environ, "TQDM_DISABLE": "1"}
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--place", help="a folder on the disk to measure")
    parser.add_argument("child", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:  # this process is one of the children
        name, *rest = options.child
        if name == "make":
            make(Path(rest[0]), float(rest[1]))
        elif name == "check":
            found = {"largest": largest(Path(rest[0])), "error": same(Path(rest[1]), Path(rest[2]))}
            print(json.dumps(found))
        else:
            work(name, *map(Path, rest))
        return
    figures = {}
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        child("make", place, str(options.gigabytes))
        for model in ("SmolLM2-135M", "random Llama"):
            base, adapter = f"{place}/{model}", f"{place}/{model} adapter"
            runs: dict[str, list[dict]] = {way: [] for way in WAYS}
            for round_ in range(options.repeats + 1):
                for way in WAYS:
                    done = child(way, base, adapter, f"{place}/{way}")
                    if round_:  # the first is the warm-up
                        runs[way].append(done)
                    elif way == "peft":
                        checked = child("check", base, f"{place}/qcft", f"{place}/peft")
                    if round_ or way != "qcft":
                        shutil.rmtree(f"{place}/{way}")
                shutil.rmtree(f"{place}/qcft", ignore_errors=True)
            seconds, peaks = (
                {way: statistics.median(r[key] for r in runs[way]) for way in WAYS} for key in ("seconds", "peak")
            )
            limit = 1.2 * (SHARD + 4 * checked["largest"])
            size = sum(file.stat().st_size for file in Path(base).glob("*.safetensors"))
            shards = len(list(Path(base).glob("*.safetensors")))
            print(f"\n{model}: {size / 1e9:.2f} GB in {shards} shards, median of {options.repeats}")
            print(f"{'':8}{'seconds':>10}{'peak MB over the libraries':>30}")
            for way in WAYS:
                print(f"{way:8}{seconds[way]:10.2f}{peaks[way] / 1e6:30.0f}")
            print(f"largest relative difference of a tensor to PEFT's (bf16): {checked['error']:.1e}")
            key = "small" if model.startswith("Smol") else "large"
            ratio = seconds["qcft"] / seconds["copy"]
            figures |= {
                f"peak_{key}": {
                    "value": round(peaks["qcft"] / 1e6),
                    "unit": "MB",
                    "goal": round(limit / 1e6),
                    "met": peaks["qcft"] <= limit,
                },
                f"peak_{key}_peft": {"value": round(peaks["peft"] / 1e6), "unit": "MB", "goal": None, "met": None},
                f"time_{key}_over_copy": {"value": round(ratio, 2), "unit": "x", "goal": 2, "met": ratio <= 2},
                f"time_{key}_of_pefts": {
                    "value": round(seconds["qcft"] / seconds["peft"], 2),
                    "unit": "x",
                    "goal": None,
                    "met": None,
                },
            }
    print(json.dumps({"benchmark": "merge", "figures": figures, "machine": platform.platform()}))


if __name__ == "__main__":
    main()
