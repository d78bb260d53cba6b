"""Whether this machine can do the work: each part is tested, with the command that fixes it where it fails."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qcft.cache import cache_folder
from qcft.errors import InputError, short
from qcft.files import disk_free
from qcft.installing import bounds, install
from qcft.models.gpus import asked_device, choose_gpu, unusable_gpu
from qcft.models.load import compute_dtype, device
from qcft.store.steps import PACKAGES, package_versions, writable
from qcft.store.upkeep import size_of

GIB = 2**30
LEAST_FREE = 5 * GIB  # bytes of disk; more than a merged 1B model and its adapters need
CLOSE = 0.05  # of NF4 products to products with the dequantised weights, relative
HUB_SECONDS = 5


@dataclass(frozen=True)
class Finding:
    """One test. `needed`: without it qcft does not work; `mend`: the command that fixes it."""

    name: str
    ok: bool
    found: str
    needed: bool = True
    mend: str = ""


def examine(runs: Path) -> list[Finding]:
    """Everything `qcft doctor` tests, in order. Nothing is written."""
    checks: dict[str, Callable[[], Finding]] = {
        "Python": _python, "packages": _packages, "GPU": _cuda, "fused head": _fused, "16 bits": _half_precision,
        "bitsandbytes": _four_bits, "runs folder": lambda: _disk(runs), "cache": _cache, "model hub": _hub,
    }  # fmt: skip
    findings = []
    for name, check in checks.items():
        try:
            findings.append(check())
        except ImportError as error:  # a package that is missing or broken: the other tests can still run
            findings.append(Finding(name, False, f"fails: {short(error)}", mend=install(PACKAGES)))
    return findings


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", sys.version_info >= (3, 11), version, mend="install Python 3.11 or later")


def _packages() -> Finding:
    found = package_versions()
    missing = [name for name in PACKAGES if name not in found]
    wanted = bounds()
    wrong = [name for name in PACKAGES if not _within(found.get(name), wanted.get(name, ""))]
    texts = [f"missing: {', '.join(missing)}"] if missing else []
    texts += [f"{name} must be {wanted[name]}" for name in wrong]
    texts.append(", ".join(f"{name} {version}" for name, version in found.items()))
    return Finding("packages", not (missing or wrong), "; ".join(texts), mend=install([*missing, *wrong] or PACKAGES))


def _within(version: str | None, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return version is None or SpecifierSet(wanted).contains(version, prereleases=True)


def _cuda() -> Finding:
    import torch

    try:
        if asked_device() == "cpu":
            return Finding("GPU", True, "not used, as the CPU was requested", False)
        if unusable := unusable_gpu():
            return Finding("GPU", False, unusable[0], mend=unusable[1])
        chosen = choose_gpu()
    except InputError as error:
        return Finding("GPU", False, error.message, mend=error.hint)
    if not torch.cuda.is_available():
        return Finding("GPU", True, "none: work runs on the CPU, which is slow for more than small models", False)
    free, total = torch.cuda.mem_get_info()
    name = chosen or torch.cuda.get_device_name()
    return Finding("GPU", True, f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free", needed=False)


def _fused() -> Finding:
    """A step of training's head; on a card, Triton compiles it."""
    from qcft.training.fused import fused_step, what_is_missing

    why = fused_step()
    if why is None:
        return Finding(
            "fused head", True, f"a step works on the {'GPU' if device() == 'cuda' else 'CPU'}", needed=False
        )
    mend = what_is_missing() or "run again with TRITON_CACHE_DIR set to a folder that can be written"
    return Finding("fused head", False, f"training runs without Triton, more slowly: {why}", False, mend)


def _half_precision() -> Finding:
    dtype = str(compute_dtype()).removeprefix("torch.")
    where = "GPU" if device() == "cuda" else "CPU"
    lacks = "" if dtype == "bfloat16" else ", which has no bfloat16: losses are scaled"
    return Finding("16 bits", True, f"{dtype} on the {where}{lacks}", needed=False)


def _four_bits() -> Finding:
    """A product with NF4 weights and its gradient, against the same with those weights dequantised."""
    mend = install(["bitsandbytes"], "--force-reinstall", "--no-deps")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports kernels that it does not need
    try:
        import bitsandbytes as bnb
        import torch

        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(128, 256, generator=generator).to(device(), compute_dtype())
        x = torch.randn(8, 256, generator=generator).to(device(), compute_dtype()).requires_grad_()
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        plain = bnb.functional.dequantize_4bit(packed, state)
        product = bnb.matmul_4bit(x, packed.t(), quant_state=state)
        (gradient,) = torch.autograd.grad(product.float().sum(), x)
        far = max(_distance(product, x @ plain.t()), _distance(gradient, plain.sum(0).expand_as(x)))
    except Exception as error:  # whatever a broken binary raises: that is what is tested here
        return Finding("bitsandbytes", False, f"fails: {short(error)}", mend=mend)
    return Finding(
        "bitsandbytes", far < CLOSE, f"NF4 products and gradients are off by {far:.2g} (relative)", mend=mend
    )


def _distance(a: object, b: object) -> float:
    import torch

    assert isinstance(a, torch.Tensor)
    assert isinstance(b, torch.Tensor)
    return float((a.detach().float() - b.detach().float()).norm() / b.detach().float().norm())


def _disk(runs: Path) -> Finding:
    try:
        writable(runs)
    except InputError as error:
        return Finding("runs folder", False, error.message, mend="qcft run ... --runs FOLDER, or QCFT_RUNS=FOLDER")
    free = disk_free(runs)
    mend = f"qcft gc --delete --runs {shlex.quote(str(runs))}"
    return Finding("runs folder", free > LEAST_FREE, f"{free / GIB:.0f} GiB free in {runs}", False, mend)


def _cache() -> Finding:
    place = cache_folder()
    size = size_of(place)
    existing = place
    while not existing.exists():
        existing = existing.parent
    ok = os.access(existing, os.W_OK)
    found = f"{size / GIB:.1f} GiB in {place}" + ("" if ok else ", which cannot be written")
    return Finding("cache", ok, found, mend="export QCFT_CACHE=FOLDER")


def _hub() -> Finding:
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.constants import ENDPOINT

    try:
        HfApi().model_info("gpt2", timeout=HUB_SECONDS)
    except Exception as error:  # whatever the hub's HTTP client raises
        if is_offline_mode():
            found, mend = "not tested, as HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE"
        elif getattr(getattr(error, "response", None), "status_code", None) == 401:
            found, mend = f"{ENDPOINT} does not accept the access token that is set", "hf auth login"
        else:
            found, mend = f"{ENDPOINT} cannot be reached ({type(error).__name__})", f"curl -I {ENDPOINT}"
        return Finding("model hub", False, f"{found}; local folders and files work", needed=False, mend=mend)
    return Finding("model hub", True, f"{ENDPOINT} answers", needed=False)
