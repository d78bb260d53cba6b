"""The quickstart without remedies, with each one, and with both: the loss in English and the gain in the languages.

    python tests/benchmarks/remedies.py [--set KEY=VALUE]... [--seeds 0]

All arms share base, phase 1 and merge. Results: seconds and peak memory of the quickstart itself (the last arm), the
smallest decrease of a language's NLL, and each arm's English loss.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time

ARMS = {
    "no remedy": ["phase2.freeze=none", "phase2.replay=null"],
    "freeze first:20": ["phase2.replay=null"],
    "replay 0.2": ["phase2.freeze=none"],
    "both (the quickstart)": [],
}

KEYS = dict(zip(ARMS, ("no_remedy", "freeze", "replay", "both"), strict=True))


def run(runs: str, sets: list[str]) -> tuple[dict, float, float]:
    """Run a recipe in a process: its table, seconds, and peak memory in GB."""
    command = [sys.executable, "-m", "qcft", "run", "quickstart", "--runs", runs, "--json", "--quiet"]
    begun = time.monotonic()
    done = subprocess.run([*command, *(x for s in sets for x in ("--set", s))], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
    return json.loads(done.stdout), time.monotonic() - begun, peak


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", action="append", default=[], help="change the recipe of every arm")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    options = parser.parse_args()
    figures = {}
    for seed in options.seeds.split(","):
        with tempfile.TemporaryDirectory() as runs:
            # The quickstart runs first and by itself, as a user runs it; the other arms then share its phase 1.
            whole = run(os.path.join(runs, "runs"), [*options.set, f"seed={seed}"])
            rows = {}
            for name, sets in ARMS.items():
                rows[name] = run(os.path.join(runs, "runs"), [*options.set, f"seed={seed}", *sets])[0]
        print(f"\nseed {seed}: NLL since phase 1 [95% interval], and mean length of the English answers")
        groups = [g["name"] for g in whole[0]["groups"]]
        print(f"{'':24}" + "".join(f"{g:>28}" for g in groups) + f"{'tokens':>10}")
        for name, table in rows.items():
            change = table["changes"][0]["groups"]
            cells = [f"{c['value']:+.3f} [{c['low']:+.2f}, {c['high']:+.2f}]" for c in (change[g] for g in groups)]
            length = table["stages"][-1]["answers"]["mean_tokens"]
            print(f"{name:24}" + "".join(f"{c:>28}" for c in cells) + f"{length:10.1f}")
            english = next(g["name"] for g in table["groups"] if g["english"])
            figures[f"english_loss_{KEYS[name]}_seed{seed}"] = {
                "value": round(change[english]["value"], 3),
                "unit": "nats",
                "goal": None,
                "met": None,
            }
        before = next(s for s in whole[0]["stages"] if s["stage"] == "eval/base")["groups"]
        after = whole[0]["stages"][-1]["groups"]
        falls = [1 - after[g["name"]]["nll"] / before[g["name"]]["nll"] for g in whole[0]["groups"] if not g["english"]]
        figures[f"seconds_seed{seed}"] = {"value": round(whole[1]), "unit": "s", "goal": 360, "met": whole[1] <= 360}
        figures[f"peak_seed{seed}"] = {"value": round(whole[2], 2), "unit": "GB", "goal": 5, "met": whole[2] <= 5}
        figures[f"least_fall_seed{seed}"] = {
            "value": round(min(falls), 3),
            "unit": "of the 4-bit base's NLL",
            "goal": 0.1,
            "met": min(falls) > 0.1,
        }
    print(json.dumps({"benchmark": "remedies", "figures": figures, "machine": platform.platform()}))


if __name__ == "__main__":
    main()
