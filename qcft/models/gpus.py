"""Where work runs: on the CPU or on one NVIDIA card; and the reason why torch cannot use a card."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from qcft.errors import InputError, short
from qcft.installing import install

VARIABLE = "QCFT_DEVICE"
CHOICE = re.compile(r"cpu|cuda(?::(\d+))?")
WSL = "/usr/lib/wsl/lib"  # where Windows puts its driver's tools; not on PATH
PROC = Path("/proc/driver/nvidia/gpus")
# The oldest driver for each major version of CUDA, and the wheels that PyTorch publishes for 2.11 to 2.13 (its
# RELEASE.md): CUDA 12.6 for compute capabilities 5.0 to 9.0 (Maxwell to Hopper), CUDA 13.0 for 7.5 (Turing) and later.
DRIVERS = {12: 525, 13: 580}
OLDEST, TURING, BLACKWELL = 5.0, 7.5, 10.0
INDEX = "https://download.pytorch.org/whl/"


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA card as its driver lists it; `capability`: its compute capability, if the driver reports it."""

    name: str
    driver: str
    capability: float | None

    @property
    def major(self) -> int:
        """The driver's major version."""
        return int(self.driver.split(".")[0])


def asked_device() -> str | None:
    """The device that QCFT_DEVICE (or --cpu) asks for: `cpu`, `cuda`, `cuda:N`, or None. Raises InputError."""
    asked = os.environ.get(VARIABLE, "").strip().lower()
    if asked and not CHOICE.fullmatch(asked):
        raise InputError(f"{VARIABLE}={asked!r} is not a device", "use cpu, cuda, or one of several cards: cuda:1")
    return asked or None


def choose_gpu() -> str | None:
    """Make the requested card the current one, the only one this process uses; returns its name if there are several.

    Raises InputError if there is no such card, or torch cannot use it.
    """
    import torch

    asked = asked_device()
    if asked == "cpu":
        return None
    if unusable := unusable_gpu():
        raise InputError(unusable[0], f"{unusable[1]}; --cpu trains on the CPU")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    match = CHOICE.fullmatch(asked or "")
    index = int(match[1]) if match and match[1] else None
    if asked and (index or 0) >= count:
        there = f"it sees {count}, cuda:0 to cuda:{count - 1}" if count > 1 else f"it sees {'one' if count else 'none'}"
        raise InputError(f"{VARIABLE}={asked}: torch finds no such GPU; {there}", "use another, or cpu")
    if index is not None:
        torch.cuda.set_device(index)
    if count < 2:
        return None
    current = torch.cuda.current_device()
    return f"cuda:{current} of {count} ({torch.cuda.get_device_name(current)})"


def unusable_gpu() -> tuple[str, str] | None:
    """The reason why torch cannot use this machine's NVIDIA card, and a fix; None if it can, or there is no card.

    Cards that CUDA_VISIBLE_DEVICES hides do not count.
    """
    import torch

    if torch.cuda.is_available():
        return _too_old()
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() in {"", "-1"}:
        return None
    try:
        card = listed_gpu()
    except RuntimeError as error:
        return f"there is an NVIDIA GPU, but its driver does not work: {error}", "restart the machine"
    if card is None:
        return None
    has, cuda, remedy = f"{card.name}, driver {card.driver}", torch.version.cuda, _remedy(card)
    if cuda is None:
        return f"torch {torch.__version__} is built without CUDA and cannot use the GPU ({has})", remedy
    needed = DRIVERS.get(int(cuda.split(".")[0]), 0)
    if card.major < needed:
        return f"torch {torch.__version__} (CUDA {cuda}) needs NVIDIA driver {needed} or later ({has})", remedy
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
        why = "no reason is given"
    except (RuntimeError, AssertionError) as error:
        why = short(error)
    return f"torch {torch.__version__} (CUDA {cuda}) cannot use the GPU ({has}): {why}", "restart the machine"


def listed_gpu() -> Gpu | None:
    """The first card that the driver's nvidia-smi lists; None if there is none.

    An entry in /proc alone does not count, as containers show the host's. Raises RuntimeError with nvidia-smi's message
    if it fails although /proc shows a card.
    """
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path=WSL)
    if program is None:
        return None
    for fields in ("name,driver_version,compute_cap", "name,driver_version"):  # older drivers lack the last field
        query = [program, f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RuntimeError(short(error)) from None
        parts = [part.strip() for part in done.stdout.partition("\n")[0].split(",")]
        if done.returncode == 0 and len(parts) >= 2 and parts[1][:1].isdigit():
            capability = parts[2] if len(parts) > 2 else ""
            return Gpu(parts[0], parts[1], float(capability) if re.fullmatch(r"\d+\.\d+", capability) else None)
    if PROC.is_dir() and any(PROC.iterdir()):
        raise RuntimeError(" ".join((done.stdout + done.stderr).split())[:160] or f"exit code {done.returncode}")
    return None


def _too_old() -> tuple[str, str] | None:
    """The reason why the current card cannot run any of the kernels that torch was built with; None if it can."""
    import torch

    built = [
        int(name.removeprefix("sm_").rstrip("af")) for name in torch.cuda.get_arch_list() if name.startswith("sm_")
    ]
    major, minor = torch.cuda.get_device_capability()
    if not built or 10 * major + minor >= min(built):
        return None
    name = torch.cuda.get_device_name()
    what = f"torch {torch.__version__} (CUDA {torch.version.cuda}) has no kernels for the GPU ({name}, {major}.{minor})"
    return what, _wheels("cu126") if float(f"{major}.{minor}") >= OLDEST else _CPU


_CPU = "no PyTorch version that qcft supports has kernels for it: use the CPU"


def _remedy(card: Gpu) -> str:
    """The fix that makes torch usable on a card: another build of torch, a newer driver, or both."""
    if card.capability is not None and card.capability < OLDEST:
        return _CPU
    old_card = card.capability is not None and card.capability < TURING
    if card.major >= DRIVERS[13]:
        return _wheels("cu126" if old_card else "cu130")
    if card.capability is not None and card.capability >= BLACKWELL:
        return f"update the NVIDIA driver to {DRIVERS[13]} or later, then {_wheels('cu130')}"
    if card.major >= DRIVERS[12]:
        return _wheels("cu126")
    return f"update the NVIDIA driver to {DRIVERS[12]} or later, then {_wheels('cu126')}"


def _wheels(build: str) -> str:
    return install(["torch"], "--force-reinstall", "--index-url", INDEX + build)
