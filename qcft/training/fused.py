"""TRL's fused head on a card: Triton compiles it at the first step, and needs a C compiler and Python.h for this."""

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
PACKAGES = {  # by package manager: a C compiler, and Python.h
    "apt-get": ("sudo apt-get install", "gcc", f"{PYTHON}-dev"),
    "dnf": ("sudo dnf install", "gcc", "python3-devel"),
    "zypper": ("sudo zypper install", "gcc", "python3-devel"),
    "pacman": ("sudo pacman -S", "gcc", "python"),
}


def fused_step() -> str | None:
    """Try a step of the fused head; the reason why it fails, or None. Raises QcftError if TRL has changed."""
    import torch

    try:
        states = torch.ones(8, 64, device=device(), dtype=compute_dtype()).requires_grad_()
        first_word(states, torch.ones(512, 64, device=device(), dtype=compute_dtype())).backward()  # type: ignore[no-untyped-call]
        if device() == "cuda":
            torch.cuda.synchronize()
    except QcftError:
        raise
    except Exception as error:  # Triton, the compiler it calls, or CUDA may raise anything
        return short(error)
    return None


def what_is_missing() -> str:
    """The command that installs what Triton lacks; empty if nothing is missing, or the system is unknown."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    headers = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
    for program, (install, gcc, python) in PACKAGES.items():
        if shutil.which(program) and not (compiler and headers):
            return " ".join([install, *([] if compiler else [gcc]), *([] if headers else [python])])
    return ""


@cache
def use_triton_where_it_works(watch: Watch) -> None:
    """On a card, run the head with PyTorch's own operations if a step with Triton fails; reported once."""
    if device() != "cuda":
        return
    try:
        why = fused_step()
    except QcftError as error:  # TRL has changed, so the step could not be tried
        watch.note(error.message, "warning")
        return
    if why is None:
        return
    without_triton()
    if again := fused_step():
        raise QcftError(f"the GPU fails at a first small step: {again}", "run qcft doctor, or train on the CPU: --cpu")
    helps = f"; what helps: {what_is_missing()}" if what_is_missing() else ""
    watch.note(f"training runs without Triton, more slowly, as it fails here: {why}{helps}", "warning")


def without_triton() -> None:
    """Make TRL's head use its code for machines without Triton. Raises QcftError if TRL has changed."""
    private("trl.kernels.chunked_logprob:_TRITON_AVAILABLE")
    from trl.kernels import chunked_logprob

    chunked_logprob._TRITON_AVAILABLE = False  # read at every call
