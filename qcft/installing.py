"""The commands that install what is missing, in versions that qcft accepts."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path


def bounds() -> dict[str, str]:
    """The versions that qcft requires, by package, those of its extras included."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(text) for text in requires("qcft") or []]
    except PackageNotFoundError:  # a folder of sources that was not installed
        return {}
    return {one.name: str(one.specifier) for one in asked if one.specifier}


def install(packages: Iterable[str], *options: str) -> str:
    """The command that installs packages with this Python."""
    wanted = bounds()
    named = (shlex.quote(name + wanted.get(name, "")) for name in packages)
    return " ".join([Path(sys.executable).name, "-m", "pip", "install", *options, *named])
