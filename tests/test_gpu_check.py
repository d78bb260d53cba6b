"""tests/gpu/check.py with --dry: what its quick parts find on a CPU, and what becomes of a part that fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
CHECK = [sys.executable, str(ROOT / "tests" / "gpu" / "check.py")]


def run_check(folder: Path, parts: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    line = [*CHECK, "--out", "out", "--work", "work", "--dry", "--parts", parts]
    done = subprocess.run(line, capture_output=True, text=True, timeout=400, cwd=folder)
    file = folder / "out" / "results.jsonl"
    return done, [json.loads(text) for text in file.read_text().splitlines()] if file.is_file() else []


def is_gone(pid: int) -> bool:
    """Whether a process has ended, within seconds; its parent may not have asked for its exit code yet."""
    for _ in range(100):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def found(lines: list[dict], part: str, what: str) -> dict:
    """The one line of that part and name."""
    (line,) = [line for line in lines if (line["part"], line.get("what")) == (part, what)]
    return line


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> list[dict]:
    done, lines = run_check(tmp_path_factory.mktemp("gpu"), "env,optimizer,resume")
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(text) for text in done.stdout.splitlines()] == lines
    return lines


def test_every_part_ends_and_nothing_fails(lines):
    assert not [line for line in lines if "failed" in line or "skipped" in line]
    ends = [(line["part"], line.get("exit")) for line in lines if line["what"] == "end"]
    assert ends == [("env", 0), ("optimizer", 0), ("resume", 0), ("all", None)]


def test_kernels_are_near_to_plain_arithmetic(lines):
    assert found(lines, "env", "machine")["versions"]["torch"]
    head = found(lines, "env", "fused head")
    assert 0 < head["values_off"] < 1e-2
    assert 0 < head["gradient_off"] < 1e-2
    rows = found(lines, "env", "attention by rows")
    assert 0 < rows["values_off"] < 1e-2
    assert 0 < rows["query_gradient_off"] < 1e-2
    assert rows["equal_twice"] == rows["equal_twice_deterministic"] == [True] * 3
    together = found(lines, "env", "attention by one kernel")  # which a CPU has not: rows beside rows
    assert (together["kernel"], together["values_off"], together["rows_see_each_other"]) == (False, 0, False)
    products = found(lines, "env", "products with 4-bit weights")
    assert all(0 < products[f"{n} tokens"]["off"] < 1e-2 for n in (1, 16))


def test_a_saved_optimizer_continues_to_the_same_weights(lines):
    for kind in ("PagedAdamW8bit", "AdamW8bit"):
        one = found(lines, "optimizer", kind)
        assert (one["equal"], one["largest_difference"], one["loaded_on"]) == (True, 0, "cpu")
        assert one["state"].startswith("uint8")


def test_a_killed_training_resumes_to_the_same_adapter(lines):
    assert 14 <= found(lines, "resume", "killed")["at_step"] < 24
    resumed = found(lines, "resume", "deterministic: true: killed and resumed")
    assert (resumed["adapter_equal"], resumed["losses_equal"]) == (True, True)
    assert 12 <= resumed["resumed_from"] < resumed["steps"] == 24


def test_a_part_that_dies_fails_or_hangs_prints_a_line_and_the_next_one_runs(tmp_path):
    done, lines = run_check(tmp_path, "selftest:die,selftest:fail,selftest:hang,selftest:fail")
    assert done.returncode == 0
    ends = [line for line in lines if line["what"] == "end"]
    assert [line.get("failed") for line in ends] == [
        "killed by SIGKILL", "see above", "not done after 2 s", "see above", None,
    ]  # fmt: skip
    assert [line["part"] for line in lines if line["what"] == "started"] == [line["part"] for line in ends[:-1]]
    assert [line["failed"] for line in lines if line["what"] == "part"] == ["ValueError: as asked"] * 2
    assert is_gone(found(lines, "selftest:hang", "child")["pid"])  # what the hanging part had started ends with it


def test_an_unknown_part_is_refused_in_two_lines(tmp_path):
    for parts in ("env,memory:2B", "memory", "nonsense", ""):
        done, lines = run_check(tmp_path, parts)
        assert (done.returncode, done.stdout, lines) == (2, "", [])
        error, hint = done.stderr.splitlines()
        assert error == f"error: there is no part {parts.split(',')[-1]!r}"
        assert hint.startswith("hint: parts are env, doctor, gpu_tests, ")
        assert "selftest" not in hint
    done = subprocess.run([*CHECK, "--second", "9"], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 2)
    assert done.stderr.splitlines()[1].startswith("hint: ")


def test_without_a_card_only_a_dry_run_is_possible(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    line = [*CHECK, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--parts", "env"]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == "error: there is no CUDA card here\nhint: run it on a machine with one, or with --dry\n"
    assert not (tmp_path / "out").exists()
