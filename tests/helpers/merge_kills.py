"""Merges that are killed at random."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from qcft.files import file_digest

MERGING = """
import sys
from pathlib import Path
from qcft.events import Watch
from qcft.models import merge
from qcft.runner.delivery import whole_folder
base, adapter, place = map(Path, sys.argv[1:4])
merge.SHARD_BYTES, merge.BLOCK = map(int, sys.argv[4:])
print("begun", flush=True)
with whole_folder(place) as work:
    merge.merge_adapters(base, [adapter], work, Watch())
"""


def kill_merges(base: Path, adapter: Path, place: Path, times: int, seed: int, shard: int, block: int) -> int:
    """Kill `times` merges to a folder at random moments; after each the folder is complete or absent, and the next
    merge writes the same files. Returns how many were killed before they were done."""
    command = [sys.executable, "-c", MERGING, base, adapter, place, str(shard), str(block)]
    rng = random.Random(seed)

    def merge(kill_after: float | None) -> float:
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"begun\n"
        begun = time.monotonic()
        if kill_after is not None:
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
        process.wait()
        return time.monotonic() - begun

    def content() -> dict[str, str]:
        return {file.name: file_digest(file) for file in place.iterdir()}

    longest, killed = merge(None), 0
    whole = content()
    for _ in range(times):
        shutil.rmtree(place, ignore_errors=True)
        merge(rng.uniform(0, longest))
        if place.exists():
            assert content() == whole
        else:
            killed += 1
    if not place.exists():
        merge(None)
    assert content() == whole
    assert not list(place.parent.glob(".*.partial"))
    return killed
