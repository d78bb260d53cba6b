"""A run killed once in every kind of step and in its report; tests/soak/kills.py does it at random, again and again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_a_kill_in_each_kind_of_step_changes_nothing():
    pytest.importorskip("lm_eval")
    command = [sys.executable, "tests/soak/kills.py", "--each"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    killed = [line.split(": ")[1] for line in done.stdout.splitlines() if line.startswith("kill ")]
    assert [title.split()[0] for title in killed] == [
        "measure", "train", "merge", "check", "generate", "evaluate", "report",
    ]  # fmt: skip
    assert "every finished run equal to the bit to the one left alone" in done.stdout
