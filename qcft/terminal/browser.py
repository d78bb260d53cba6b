"""Opening a page in the browser."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path

DISPLAYS = ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")


def open_page(page: Path) -> bool:
    """Open a page in the browser, the one that BROWSER names if any; False where that cannot be done.

    Without a display only a text browser would be found, which takes the terminal. What a browser prints goes to
    stderr.
    """
    if sys.platform.startswith("linux") and not any(os.environ.get(name) for name in DISPLAYS):
        return False
    sys.stdout.flush()
    out = os.dup(1)
    os.dup2(2, 1)
    try:
        return webbrowser.open(page.resolve().as_uri())
    finally:
        os.dup2(out, 1)
        os.close(out)
