"""CPU time of `qcft --help`, compared with a Python that does nothing and one that imports torch."""

import json
import platform
import resource
import statistics
import subprocess
import sys

COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "qcft --help": [sys.executable, "-m", "qcft", "--help"],
    "import torch": [sys.executable, "-c", "import torch"],
}
ROUNDS = 5


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)


def main() -> None:
    for command in COMMANDS.values():
        cpu_seconds(command)  # warm-up
    times = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            times[name].append(cpu_seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:14} {seconds:6.3f} s of CPU time (median of {ROUNDS})")
    seconds = medians["qcft --help"]
    figures = {"help_cpu": {"value": round(seconds, 3), "unit": "s", "goal": 0.3, "met": seconds < 0.3}}
    print(json.dumps({"benchmark": "help_time", "figures": figures, "machine": platform.platform()}))


if __name__ == "__main__":
    main()
