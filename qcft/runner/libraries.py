"""The libraries' settings and chatter, seen to before they are loaded for work."""

from __future__ import annotations

import gc
import os
import sys
from functools import cache

from qcft.cache import ensure_home


def set_environment() -> None:
    """Settings the libraries read when they are first imported; what the user has set stays."""
    ensure_home()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if sys.platform != "win32" and "PYTORCH_ALLOC_CONF" not in os.environ:  # its newer name
        # Passes differ in size: blocks that can grow leave no gaps between them that nothing fits into.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars in a log file are noise
    _loaded_by_others()


def quiet() -> None:
    """Silence their progress bars and warnings; imports them."""
    from qcft.models.load import quiet_libraries

    quiet_libraries()


@cache
def exclude_from_gc() -> None:
    """Load what steps work with, and take it out of the garbage collector's sight, once.

    The libraries' half a million objects live as long as the process, but every collection walks them: 0.4 s each time
    that a model is let go of, more than a small model's whole step. Where others loaded transformers before qcft, a
    model of theirs may be alive, which would never be collected: nothing is done then.
    """
    if _loaded_by_others():
        return
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401

    gc.collect()
    gc.freeze()


@cache
def _loaded_by_others() -> bool:
    """Whether transformers was loaded when qcft was first called."""
    return "transformers" in sys.modules
