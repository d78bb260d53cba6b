"""What can go wrong, and the exit code it ends with.

QcftError              1   something failed during the work
├── InputError         2   what the user gave cannot be used; nothing was written
├── ChangedInput       1   a file that results depend on changed while it was in use
└── Interrupted  130/143   Ctrl-C or SIGTERM (129: SIGHUP); what is finished stays usable
"""

from __future__ import annotations

import re

from qcft.safe import shown, without_tokens

# What the libraries report when memory runs out: PyTorch's CUDA allocator, with its own message and with CUDA's
# (without NVML, formatting that message fails); cuBLAS and cuDNN, which allocate by themselves; Triton; PyTorch's CPU
# allocator (on Windows "not enough memory"); oneDNN, which gives no reason; C++ and the operating system.
OUT_OF_MEMORY = (
    "CUDA out of memory", "CUDA error: out of memory", "CUDA driver error: out of memory",
    "NVML_SUCCESS == r INTERNAL ASSERT FAILED", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
    "Triton Error [CUDA]: out of memory", "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory", "could not create a primitive", "could not create a memory",
    "std::bad_alloc", "Cannot allocate memory",
)  # fmt: skip


class QcftError(Exception):
    """One line that says what is wrong, and a hint that says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        self.message = _printable(message)
        self.hint = _printable(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        """Both lines, as a traceback and a notebook show them."""
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class InputError(QcftError):
    """A value that was given cannot be used."""

    exit_code = 2


class ChangedInput(QcftError):
    """A file that results depend on changed while it was in use."""


class Interrupted(QcftError):
    """A stop was requested by the user (130), the system (143) or a terminal that was closed (129)."""

    def __init__(self, message: str, hint: str = "", exit_code: int = 130) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


def short(error: BaseException, most: int = 160) -> str:
    """Another library's error message without secrets, on one line, truncated; the error's class where it is empty."""
    return " ".join(without_tokens(str(error)).split())[:most] or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of the GPU or of the machine ran out, whichever library reports it."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError | OSError) and any(text in str(error) for text in OUT_OF_MEMORY))
    )


def nearest(word: str, known: list[str]) -> str:
    """`did you mean 'x'? ` when a known word is close to `word`, else an empty string."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}? " if close else ""


def _printable(text: str) -> str:
    """A text that is safe to show, on one line; of a word with 300 characters or more, only the first 80 are kept."""
    return re.sub(r"(\S{80})\S{220,}", r"\1...", shown(text)).replace("\n", "\\n")
