"""Run the same recipe twice, side by side on real data: once undisturbed, once killed at random times until it is done.

Phase 1 on English rows, phase 2 on other languages with generative replay, SmolLM2-135M in 4 bits on the CPU. At the
end every file of every step must be bitwise equal: adapters, merged weights, replay rows, scores, answers. It takes an
hour on two cores, of which the steps are at least 45 minutes. --compare compares two runs that are done again.

python tests/soak/overnight.py --out FOLDER --english alpaca.jsonl --data es=es.jsonl --data pt=pt.jsonl
    [--english-rows 1900] [--rows 760] [--kills 8] [--within 40] [--threads 1] [--nice 0] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import yaml

from tests.soak.kills import equal_parts

ROOT = Path(__file__).parents[2]


def recipe(options: argparse.Namespace) -> dict:
    train = {"lr": 5e-4, "batch": 8, "max_length": 512}
    data = [{"path": str(Path(path).absolute()), "lang": lang, "take": options.rows}
            for lang, path in (one.split("=", 1) for one in options.data)]  # fmt: skip
    english = {"path": str(Path(options.english).absolute()), "lang": "en", "take": options.english_rows}
    return {
        "name": "overnight",
        "model": "smollm2-135m-instruct",
        "heldout": {"share": 0.05, "rows": 24},
        "answers": {"prompts": 8, "max_new_tokens": 48},
        "phases": [
            {"name": "phase1", "data": [english], "train": train},
            {"name": "phase2", "data": data, "replay": {"ratio": 0.1, "max_new_tokens": 128, "chunk": 16},
             "train": train},
        ],
    }  # fmt: skip


def start(options: argparse.Namespace, folder: Path) -> subprocess.Popen:
    """Start the run in `folder`, in its own process; its output is appended to `said.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(options), sort_keys=False))
    threads = str(options.threads)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with (folder / "said.txt").open("a") as said:
        command = [sys.executable, "-m", "qcft", "run", "recipe.yaml"]
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=said, stderr=said, preexec_fn=lambda: os.nice(options.nice)
        )


def seconds_of(process: subprocess.Popen) -> float:
    """CPU time of a process (Linux): unlike wall time, it hardly depends on other work on the machine."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def stage_of(folder: Path) -> str:
    """The progress of a run: the title of its step, and the number of optimizer steps of a training."""
    lines = [line for line in (folder / "said.txt").read_text().splitlines() if line.startswith("[")]
    title = lines[-1].split("] ", 1)[1].split("  ")[0] if lines else "reading"
    logs = sorted((folder / "runs" / ".steps").glob("train-*/log.jsonl"), key=lambda p: p.stat().st_mtime)
    if title.startswith("train ") and logs:
        title += f", step {len(logs[-1].read_text().splitlines())}"
    return title


def records(folder: Path) -> dict[str, dict]:
    """Each stage's done.json."""
    run = folder / "runs" / "overnight"
    stages = json.loads((run / "run.json").read_text())["stages"]
    return {stage: json.loads((folder / "runs" / ".steps" / step / "done.json").read_text()) | {"step": step}
            for stage, step in stages.items()}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--english", default="")
    parser.add_argument("--data", action="append", metavar="LANG=PATH", default=[])
    parser.add_argument("--english-rows", type=int, default=1900)
    parser.add_argument("--rows", type=int, default=760, help="of each language")
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--within", type=float, default=40, help="minutes of CPU time the kills fall into")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--nice", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not (options.compare or (options.english and options.data)):
        parser.error("--english and --data are needed")
    chance = random.Random(options.seed)
    moments = sorted(chance.uniform(1, options.within) * 60 for _ in range(options.kills))
    alone, killed = options.out / "alone", options.out / "killed"
    if options.compare:
        return 0 if compared(alone, killed, []) else 1
    began = time.monotonic()
    quiet, process = start(options, alone), start(options, killed)
    kills = []
    before = 0.0  # seconds of work of the processes that were killed
    while process.poll() is None:
        worked = before + seconds_of(process)
        if moments and worked >= moments[0]:
            moments.pop(0)
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills.append(stage_of(killed))
            before = worked
            print(f"kill {len(kills)} after {worked / 60:.1f} min of work: {kills[-1]}", flush=True)
            process = start(options, killed)
        time.sleep(0.2)
    print(f"killed run ended with {process.returncode} after {(time.monotonic() - began) / 60:.1f} min", flush=True)
    quiet.wait()
    print(f"the other ended with {quiet.returncode} after {(time.monotonic() - began) / 60:.1f} min", flush=True)
    good = compared(alone, killed, kills) and not quiet.returncode and not process.returncode
    return 0 if good and len(kills) == options.kills else 1


def compared(alone: Path, killed: Path, kills: list[str]) -> bool:
    """Print the two runs side by side, stage by stage; whether they are equal."""
    one, other = records(alone), records(killed)
    print(f"\n{'stage':<16} {'minutes':>8} {'files':>6} {'equal to the bit':>17}   NLL by group, alone")
    equal = one.keys() == other.keys()
    for stage, record in one.items():
        same = stage in other and equal_parts(other[stage]) == equal_parts(record)
        equal &= same
        groups = record["metrics"].get("groups")
        scores = {name: group["nll"] for name, group in groups.items()} if isinstance(groups, dict) else {}
        levels = ", ".join(f"{name} {nll:.6f}" for name, nll in scores.items())
        cells = f"{record['seconds'] / 60:>8.1f} {len(record['files']):>6} {'yes' if same else 'NO':>17}"
        print(f"{stage:<16} {cells}   {levels}")
    minutes = sum(record["seconds"] for record in one.values()) / 60
    print(f"\n{minutes:.1f} min of steps, {len(kills)} kills, {'all equal' if equal else 'NOT EQUAL'}")
    print(json.dumps({"minutes": round(minutes, 1), "kills": kills, "equal": equal}))
    return equal


if __name__ == "__main__":
    sys.exit(main())
