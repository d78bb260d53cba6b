"""The libraries' settings and chatter, seen to before they are loaded for work."""

from __future__ import annotations

import os
import sys


def set_environment() -> None:
    """Settings the libraries read when they are first imported; what the user has set stays."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars in a log file are noise


def quiet() -> None:
    """Silence their progress bars and warnings; imports them."""
    from qcft.models.load import quiet_libraries

    quiet_libraries()
