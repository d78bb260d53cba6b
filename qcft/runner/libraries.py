"""The libraries' settings and messages, set before the libraries are loaded."""

from __future__ import annotations

import gc
import logging
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
        # Passes differ in size: blocks that can grow avoid fragmentation.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as it is imported, it reports kernels it can do without
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars in a log file are noise
    _loaded_by_others()


def quiet() -> None:
    """Silence their progress bars and warnings; imports them."""
    from qcft.models.load import quiet_libraries

    quiet_libraries()


@cache
def exclude_from_gc() -> None:
    """Load the libraries that steps need, and exclude their objects from garbage collection, once.

    Their half a million objects live as long as the process, but every collection visits them: 0.4 s each time that a
    model is freed, more than a small model's whole step. Where transformers was loaded before qcft, another model may
    be alive, which would never be collected: nothing is done then.
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
