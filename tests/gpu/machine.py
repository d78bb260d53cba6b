"""Parts about the machine: versions, the kernels that a training uses, the optimizer, qcft's own tests."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tests.gpu.common import ROOT, Part, command, gib, qcft

PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "trl", "bitsandbytes", "datasets", "triton", "tokenizers", "numpy",
    "huggingface_hub",
)  # fmt: skip
SUITE = [
    "test_prefix", "test_passes", "test_probe", "test_generation", "test_training", "test_merge", "test_models",
    "test_footprint",
]  # fmt: skip
WORST = 40  # at most so many failures are named


def env(part: Part) -> None:
    """Versions and the card; then the three kernels that everything depends on, compared with plain arithmetic."""
    import torch

    found: dict[str, Any] = {
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": _commit(),
        "cc": shutil.which("cc") or shutil.which("gcc"),
        "Python.h": (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
        "cores": os.cpu_count(),
    }
    if part.cuda:
        card = torch.cuda.get_device_properties(0)
        found |= {
            "card": card.name,
            "capability": f"{card.major}.{card.minor}",
            "total_gib": gib(card.total_memory),
            "free_gib": gib(torch.cuda.mem_get_info()[0]),
            "cuda": torch.version.cuda,
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
            "driver": _driver(),
        }
    part.report("machine", **found)
    where = "cuda" if part.cuda else "cpu"
    part.attempt("fused head", lambda: fused_head(where))
    part.attempt("attention by rows", lambda: attention(where))
    part.attempt("products with 4-bit weights", lambda: four_bits(where))
    part.attempt("attention by one kernel", one_kernel)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The tested commit, with `+` if files differ from it; None outside of a git repository."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    say = [
        subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        for arguments in (("rev-parse", "--short=10", "HEAD"), ("status", "--porcelain", "-uno"))
    ]
    return say[0] + "+" * bool(say[1]) or None


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip() or None


def fused_head(where: str) -> dict[str, Any]:
    """TRL's head (Triton on a GPU) compared with double precision: values, gradient, and if two results are equal."""
    import torch
    from trl.kernels import ChunkedLogProbFunction

    torch.manual_seed(0)
    tokens, width, words = (700, 512, 70000) if where == "cuda" else (20, 32, 300)
    states = torch.randn(tokens, width, device=where).bfloat16()
    head = (torch.randn(words, width, device=where) / width**0.5).bfloat16()
    targets = torch.randint(words, (tokens,), device=where)

    def once() -> tuple[Any, Any]:
        leaf = states.clone().requires_grad_()
        made = ChunkedLogProbFunction.apply(leaf, head, None, targets, 1.0, 32768, None, 1.0, ("entropy", "is_top1"))
        made[0].sum().backward()
        return made[0].detach(), leaf.grad

    (first, slope), (second, slope_again) = once(), once()
    leaf = states.double().requires_grad_()
    reference = torch.log_softmax(leaf @ head.double().t(), -1).gather(1, targets[:, None]).squeeze(1)
    reference.sum().backward()
    return {
        "values_off": _off(first, reference),
        "gradient_off": _off(slope, leaf.grad),
        "equal_twice": bool(torch.equal(first, second) and torch.equal(slope, slope_again)),
    }


def attention(where: str) -> dict[str, Any]:
    """Attention of one row with grouped keys: its error, the kernels that ran, and if two gradients are equal."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    torch.manual_seed(0)
    heads, shared, tokens, width = (32, 8, 777, 128) if where == "cuda" else (4, 2, 77, 16)
    leaves = [
        torch.randn(1, count, tokens, width, device=where, dtype=torch.bfloat16).requires_grad_()
        for count in (heads, shared, shared)
    ]

    def run(tensors: list[Any]) -> list[Any]:
        for tensor in tensors:
            tensor.grad = None
        out = sdpa(*tensors, is_causal=True, enable_gqa=True)
        out.float().square().sum().backward()
        return [out.detach(), *(tensor.grad.clone() for tensor in tensors)]

    def same() -> list[bool]:
        return [all(map(torch.equal, run(leaves), run(leaves))) for _ in range(3)]

    plain = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for tensor in plain[1:]:
        tensor.data = tensor.data.repeat_interleave(heads // shared, 1)
    scores = (plain[0] @ plain[1].transpose(2, 3)) / width**0.5
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=where).triu(1)
    reference = torch.softmax(scores.masked_fill(mask, -torch.inf), -1) @ plain[2]
    reference.square().sum().backward()
    out, query_gradient, *_ = run(leaves)
    found: dict[str, Any] = {
        "values_off": _off(out, reference),
        "query_gradient_off": _off(query_gradient, plain[0].grad),
        "equal_twice": same(),
    }
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it, torch treats cuBLAS as not deterministic
    try:
        torch.use_deterministic_algorithms(True)
        found["equal_twice_deterministic"] = same()
    except RuntimeError as error:
        found["deterministic_refused"] = str(error)[:300]
    finally:
        torch.use_deterministic_algorithms(False)
        del os.environ["CUBLAS_WORKSPACE_CONFIG"]
    if where == "cuda":
        found["kernels"] = _kernels(lambda: run(leaves))
    return found


def _kernels(work: Any) -> list[str] | str:
    """The names of the CUDA kernels that some work runs."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            work()
        return sorted({event.key[:100] for event in seen.key_averages()})[:24]
    except Exception as error:  # the profiler may not be available; the other results are still valid
        return f"{type(error).__name__}: {error}"[:200]


def one_kernel() -> dict[str, Any]:
    """PyTorch's attention of variable lengths compared with attention row by row; in its own process."""
    line = [sys.executable, "-m", "tests.gpu.insides", "varlen"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def four_bits(where: str) -> dict[str, Any]:
    """Products with NF4 weights for 1 to 1,024 tokens, compared with dequantised weights; if training has the same."""
    import bitsandbytes as bnb
    import torch

    torch.manual_seed(0)
    rows, columns = (14336, 4096) if where == "cuda" else (128, 256)
    weight = torch.randn(rows, columns, device=where).bfloat16()
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    plain = bnb.functional.dequantize_4bit(packed, state).float()
    found: dict[str, Any] = {}
    for tokens in (1, 16, 64, 512, 1024) if where == "cuda" else (1, 16):
        x = torch.randn(tokens, columns, device=where).bfloat16()

        def product(x: Any = x) -> Any:
            with torch.no_grad():
                return bnb.matmul_4bit(x, packed.t(), quant_state=state)

        generated = product()
        trained = bnb.matmul_4bit(x.clone().requires_grad_(), packed.t(), quant_state=state)
        entry: dict[str, Any] = {
            "off": _off(generated, x.float() @ plain.t()),
            "training_is_equal": bool(torch.equal(trained.detach(), generated)),
        }
        if where == "cuda":
            entry["ms"] = _milliseconds(product)
        found[f"{tokens} tokens"] = entry
    return found


def _off(found: Any, reference: Any) -> float:
    """The norm of the difference divided by that of the reference; NaN stays NaN."""
    found, reference = found.detach().double(), reference.detach().double()
    return float(f"{float((found - reference).norm() / reference.norm()):.3g}")


def _milliseconds(work: Any, times: int = 20) -> float:
    import torch

    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        work()
    torch.cuda.synchronize()
    return round((time.perf_counter() - start) / times * 1000, 3)


def doctor(part: Part) -> None:
    """The output of `qcft doctor` on the machine."""
    ended = qcft("doctor", "--json", "--runs", part.folder())
    part.report(
        "doctor", exit=ended.exit, seconds=ended.seconds, findings=ended.json() if ended.stdout.strip() else None
    )
    broken = [one["name"] for one in ended.json() if one["needed"] and not one["ok"]] if ended.stdout.strip() else []
    if ended.exit and broken != ["packages"]:  # versions outside qcft's bounds may be tested on purpose
        part.report("broken", failed=f"exit code {ended.exit}: {', '.join(broken) or ended.stderr[-300:]}")


# ---- the optimizer ------------------------------------------------------------------------------------------------


def optimizer(part: Part) -> None:
    """bitsandbytes' 8-bit AdamW: is it paged, and does training with a saved and loaded state give the same result."""
    for name in ("PagedAdamW8bit", "AdamW8bit"):
        part.attempt(name, lambda name=name: _saved_and_loaded(name, "cuda" if part.cuda else "cpu"))
    if part.cuda:
        part.attempt("paged buffers after their optimizers are gone", _paged_left)


def _saved_and_loaded(name: str, where: str) -> dict[str, Any]:
    """Six steps, compared with three steps, saving and loading the state as the Trainer does, and three more steps."""
    import bitsandbytes as bnb
    import torch

    kind = getattr(bnb.optim, name)
    torch.manual_seed(0)
    start = torch.randn(512, 512).to(where)  # above the size from which buffers are paged

    def steps(optimizer: Any, weight: Any, numbers: range) -> None:
        for i in numbers:
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(i)).to(where)
            optimizer.step()

    whole, half = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    one, two = kind([whole], lr=1e-3), kind([half], lr=1e-3)
    steps(one, whole, range(6))
    steps(two, half, range(3))
    saved = io.BytesIO()
    torch.save(two.state_dict(), saved)
    saved.seek(0)
    after = torch.nn.Parameter(half.detach().clone())
    three = kind([after], lr=1e-3)
    three.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
    loaded = three.state[after]["state1"]
    steps(three, after, range(3, 6))
    return {
        "paged": bool(getattr(two.state[half]["state1"], "is_paged", False)),
        "loaded_on": str(loaded.device),
        "loaded_is_paged": bool(getattr(loaded, "is_paged", False)),
        "state": f"{loaded.dtype}, {tuple(loaded.shape)}".replace("torch.", ""),
        "equal": bool(torch.equal(whole, after)),
        "largest_difference": float((whole - after).detach().abs().max()),
    }


def _paged_left() -> dict[str, Any]:
    import gc

    import bitsandbytes as bnb

    gc.collect()
    kept = bnb.functional.GlobalPageManager.get_instance().paged_tensors
    return {"buffers": len(kept), "bytes": sum(tensor.nbytes for tensor in kept)}


# ---- qcft's tests -------------------------------------------------------------------------------------------------


def gpu_tests(part: Part) -> None:
    """The tests that need a GPU; without one they skip themselves."""
    _pytest(part, ["test_gpu"], 1)


def suite(part: Part) -> None:
    """The tests of everything that a GPU changes. Some require bitwise equality, as on a CPU: check which fail."""
    _pytest(part, ["test_passes"] if part.dry else SUITE, 8)


def _pytest(part: Part, names: list[str], processes: int) -> None:
    """Run test files in `processes`; the results so far if the time limit is reached."""
    # The project's own pytest options need plugins that may be missing.
    line = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-v", "-rs", "--tb=short"]
    line += ["--continue-on-collection-errors"]  # a package that only some test files need may be missing
    side_by_side = part.cuda and processes > 1 and importlib.util.find_spec("xdist") is not None
    line += ["-m", "not real", *(["-n", str(processes), "--dist", "loadfile"] if side_by_side else [])]
    line += [f"tests/{name}.py" for name in names]
    shown: list[str] = []
    found: dict[str, Any] = {}
    try:
        ended = command(line, limit=max(5.0, part.left - 5), keep=shown)
        found["exit"] = ended.exit
    except TimeoutError:
        found["timed_out"] = True
    text = "".join(shown)
    by: dict[str, dict[str, None]] = {}  # outcome -> tests, each once and in their order
    for how, test in filter(None, map(_outcome, text.splitlines())):
        by.setdefault(how, {})[test] = None
    wrong = list(by.get("FAILED", {}) | by.get("ERROR", {}))
    found |= {
        "passed": len(by.get("PASSED", {})),
        "skipped": len(by.get("SKIPPED", {})),
        "wrong": wrong[:WORST],
        "reasons": [line[:200] for line in text.splitlines() if line.startswith(("E  ", "SKIPPED ["))][:WORST],
    }
    if wrong or found.get("exit") or "timed_out" in found:
        late = "the time was up, with " if "timed_out" in found else ""
        found["failed"] = f"{late}{len(wrong)} of {len(wrong) + found['passed']} tests failed" + (
            "" if wrong or late else f" (pytest's exit code {found['exit']})"
        )
    part.report("tests", files=names, **found)


def _outcome(line: str) -> tuple[str, str] | None:
    """The outcome of a test in a line of pytest's output: `-v` with and without xdist, and the summary of failures."""
    if match := re.match(r"(?:\[gw\d+\] \[ *\d+%\] )?(PASSED|FAILED|ERROR|SKIPPED) (tests/.+?)(?: - .*)?\s*$", line):
        return match[1], match[2]
    match = re.match(r"(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", line)
    return (match[2], match[1]) if match else None
