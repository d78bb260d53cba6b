"""Rows per second and memory of reading 200,000 rows of JSONL, Parquet and CSV, compared with another checkout.

    python tests/benchmarks/loading.py [--against CHECKOUT] [--rows 200000] [--rounds 3]

Each load runs in its own process, in turn with those of CHECKOUT (its folder is put first on PYTHONPATH). Seconds are
CPU time, which depends little on other work on the machine. `peak` is the process's peak memory while it loads, `kept`
the memory of the rows afterwards: peak / kept would be 2 if all rows were in memory twice. With `--against`, times and
peaks are also printed as ratios to CHECKOUT's: above 1 is faster, or less memory.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("jsonl", "parquet", "csv")
TWICE = 1.3  # peak / kept; 2 would be all rows twice

LOAD = """
import gc, json, re, sys, time
from pathlib import Path
from qcft.data.load import load_source
from qcft.events import Watch
from qcft.recipe import HeldOut, Source
import pyarrow.parquet
def held(key):  # of this process alone: getrusage counts what its parent held
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
before, begun = held("VmRSS"), time.process_time()
found = load_source(Source(path=sys.argv[1]), HeldOut(), Watch())
seconds = time.process_time() - begun
peak = held("VmHWM") - before
gc.collect()
print(json.dumps({"seconds": seconds, "peak": peak, "kept": held("VmRSS") - before, "digest": found.digest}))
"""


def write_files(folder: Path, rows: int) -> dict[str, Path]:
    """Write rows with the columns and the size of Alpaca's, the same in each file."""
    import pyarrow as pa
    from pyarrow import parquet

    chance = random.Random(0)
    words = [f"word{i}" for i in range(5000)]

    def text(low: int, high: int) -> str:
        return " ".join(chance.choices(words, k=chance.randint(low, high)))

    table = [
        {"id": str(i), "instruction": text(6, 20), "input": text(3, 30) if i % 3 == 0 else "", "output": text(5, 100)}
        for i in range(rows)
    ]
    files = {kind: folder / f"rows.{kind}" for kind in KINDS}
    with files["jsonl"].open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in table)
    with files["csv"].open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    parquet.write_table(pa.Table.from_pylist(table), files["parquet"])
    return files


def load(checkout: Path, file: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(file)], env=environment, check=True, capture_output=True, text=True, cwd="/"
    )
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    checkouts = {"here": ROOT, **({"before": asked.against.resolve()} if asked.against else {})}
    figures: dict[str, dict[str, Any]] = {}
    print(f"{asked.rows:,} rows, medians of {asked.rounds}, seconds of CPU time")
    print(f"{'':18}{'rows/s':>10}{'peak MiB':>10}{'kept MiB':>10}{'peak/kept':>10}")
    with tempfile.TemporaryDirectory() as temporary:
        files = write_files(Path(temporary), asked.rows)
        for kind, file in files.items():
            for checkout in checkouts.values():
                load(checkout, file)  # warm-up
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
            for _ in range(asked.rounds):
                for name, checkout in checkouts.items():
                    runs[name].append(load(checkout, file))
            assert len({run["digest"] for each in runs.values() for run in each}) == 1, "the rows are not the same"
            medians = {
                name: {key: statistics.median(run[key] for run in each) for key in ("seconds", "peak", "kept")}
                for name, each in runs.items()
            }
            for name, found in medians.items():
                twice = found["peak"] / found["kept"]
                print(
                    f"{kind + ', ' + name:18}{asked.rows / found['seconds']:10,.0f}{found['peak'] / 2**20:10.0f}"
                    f"{found['kept'] / 2**20:10.0f}{twice:10.2f}"
                )
            here = medians["here"]
            figures[f"{kind}_rows_per_s"] = {"value": round(asked.rows / here["seconds"]), "unit": "rows/s"}
            figures[f"{kind}_peak"] = {"value": round(here["peak"] / 2**20), "unit": "MiB"}
            twice = round(here["peak"] / here["kept"], 2)
            figures[f"{kind}_peak_to_kept"] = {"value": twice, "unit": "x", "goal": TWICE, "met": twice <= TWICE}
            if "before" in medians:
                before = medians["before"]
                for word, key in (("speed", "seconds"), ("memory", "peak")):
                    ratio = round(before[key] / here[key], 2)
                    figures[f"{kind}_{word}_to_before"] = {
                        "value": ratio,
                        "unit": "x",
                        "goal": 0.9,
                        "met": ratio >= 0.9,
                    }
                    print(f"  {word}: {ratio:.2f}x of before")
    print(json.dumps({"benchmark": "loading", "figures": figures, "machine": platform.platform()}))


if __name__ == "__main__":
    main()
