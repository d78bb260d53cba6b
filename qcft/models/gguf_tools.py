"""llama.cpp's own tools, if they are installed: its converter and its quantizer.

They run in an empty folder, so that no file in the working folder is imported as one of their modules.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from qcft.errors import InputError, QcftError, short
from qcft.events import Watch
from qcft.models.gguf_write import CONVERTER

QUANTIZER = "llama-quantize"
PLACES = ("", "build/bin", "bin")  # in llama.cpp's folder
# llama-cpp-python's binding of the quantizer, run in a process of its own, as it prints and may abort.
BINDING = """
import ctypes, sys
import llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
source, target = (name.encode() for name in sys.argv[1:])
sys.exit(llama_cpp.llama_model_quantize(source, target, ctypes.byref(params)))
"""


@dataclass(frozen=True)
class Tools:
    """The tools that were found: the converter's script, the quantizer; `given`: in a folder that the user named."""

    converter: Path | None
    quantizer: Path | None
    given: bool

    @property
    def can_quantize(self) -> bool:
        """Whether one of the tools writes Q4_K_M."""
        return self.quantizer is not None or find_spec("llama_cpp") is not None


def find_tools(folder: Path | None) -> Tools:
    """The tools in llama.cpp's folder, if one is given, else on PATH. Raises InputError for a folder without any."""
    converter, quantizer = (_find(name, folder) for name in (CONVERTER, QUANTIZER))
    if folder is not None and converter is quantizer is None:
        raise InputError(
            f"--llama-cpp: {str(folder)!r} holds neither {CONVERTER} nor {QUANTIZER}",
            "name llama.cpp's folder; the quantizer must be in it, in bin/ or in build/bin/",
        )
    return Tools(converter, quantizer or _find(QUANTIZER, None), folder is not None)


def convert(tools: Tools, folder: Path, file: Path, kind: str, watch: Watch) -> None:
    """Write a model's folder as a GGUF file with llama.cpp's converter. Raises QcftError if that fails."""
    assert tools.converter is not None
    watch.note(f"converting with {tools.converter}")
    command = [sys.executable, str(tools.converter), str(folder), "--outfile", str(file), "--outtype", kind]
    _run(command, CONVERTER, file, watch)


def quantize(tools: Tools, source: Path, file: Path, watch: Watch) -> None:
    """Write a 16-bit GGUF file as Q4_K_M. Raises QcftError if that fails."""
    found = str(tools.quantizer) if tools.quantizer else "llama-cpp-python"
    watch.note(f"quantising with {found}")
    command = [found, str(source), str(file), "Q4_K_M"]
    if not tools.quantizer:
        command = [sys.executable, "-P", "-c", BINDING, str(source), str(file)]
    _run(command, found, file, watch)


def _run(command: Sequence[str], what: str, file: Path, watch: Watch) -> None:
    # The converter's modules are in its own folder, which PYTHONSAFEPATH would remove from sys.path.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, check=False)
    watch.check_stop()
    if done.returncode or not file.is_file():
        output = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines() or ["it wrote no file"]
        lacking = re.search(r"No module named '([\w.]+)'", output[-1])
        hint = f"pip install {lacking[1].split('.')[0]}, which it needs" if lacking else "update llama.cpp"
        raise QcftError(f"{what} failed: {short(Exception(output[-1]))}", f"{hint}, or export without --gguf")


def _find(name: str, folder: Path | None) -> Path | None:
    if folder is not None:
        found = (folder / place / name for place in PLACES)
        return next((one.resolve() for one in found if one.is_file()), None)
    on_path = shutil.which(name)
    if on_path is None and name == CONVERTER:  # a script need not be executable
        folders = map(Path, os.environ.get("PATH", "").split(os.pathsep))
        on_path = next((str(one / name) for one in folders if (one / name).is_file()), None)
    # Relative folders on PATH are ignored: they would mean a different program in each working folder.
    return Path(on_path) if on_path and os.path.isabs(on_path) else None
