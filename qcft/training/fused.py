"""TRL's fused head on a card: Triton compiles it at its first step, for which it needs a C compiler and Python.h."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from functools import cache
from pathlib import Path

from qcft.errors import QcftError, short
from qcft.events import Watch
from qcft.models.load import compute_dtype, device
from qcft.private import private
from qcft.training.head import first_word

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
PACKAGES = {  # by the program that installs them: a C compiler, and Python.h
    "apt-get": ("sudo apt-get install", "gcc", f"{PYTHON}-dev"),
    "dnf": ("sudo dnf install", "gcc", "python3-devel"),
    "zypper": ("sudo zypper install", "gcc", "python3-devel"),
    "pacman": ("sudo pacman -S", "gcc", "python"),
}


def fused_step() -> str | None:
    """Make a step of the fused head where work runs; why that fails, or None. Raises QcftError where TRL changed."""
    import torch

    try:
        states = torch.ones(8, 64, device=device(), dtype=compute_dtype()).requires_grad_()
        first_word(states, torch.ones(512, 64, device=device(), dtype=compute_dtype())).backward()  # type: ignore[no-untyped-call]
        if device() == "cuda":
            torch.cuda.synchronize()
    except QcftError:
        raise
    except Exception as error:  # whatever Triton, the compiler it calls or CUDA raise
        return short(error)
    return None


def what_is_missing() -> str:
    """The command that installs what Triton lacks; empty where it has all it needs, or the system is not known."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    headers = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
    for program, (install, gcc, python) in PACKAGES.items():
        if shutil.which(program) and not (compiler and headers):
            return " ".join([install, *([] if compiler else [gcc]), *([] if headers else [python])])
    return ""


@cache
def use_triton_where_it_works(watch: Watch) -> None:
    """On a card, have the head run in PyTorch's own operations where a step with Triton fails; told once."""
    if device() != "cuda":
        return
    try:
        why = fused_step()
    except QcftError as error:  # TRL has changed: what the step would show is not known
        watch.note(error.message, "warning")
        return
    if why is None:
        return
    without_triton()
    if again := fused_step():
        raise QcftError(f"the GPU fails at a first small step: {again}", "qcft doctor; or train on the CPU with --cpu")
    helps = f"; what helps: {what_is_missing()}" if what_is_missing() else ""
    watch.note(f"training runs without Triton, more slowly, as it fails here: {why}{helps}", "warning")


def without_triton() -> None:
    """Have TRL's head take its path for machines without Triton. Raises QcftError where TRL has changed."""
    private("trl.kernels.chunked_logprob:_TRITON_AVAILABLE")
    from trl.kernels import chunked_logprob

    chunked_logprob._TRITON_AVAILABLE = False  # asked at every call
