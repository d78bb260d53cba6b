"""Run tiny models of many families through the whole chain, each in its own process; print a table of the results.

    python tests/soak/families.py [FAMILY ...]

To run by hand: about 20 minutes on two cores for all of them. A family is either refused before anything runs, with
its name and the reason; or it is scored, answers, is trained in two phases, merged and exported, with the same results
as transformers and PEFT.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

SECONDS = 300  # of one family at most


def main(names: list[str]) -> None:
    """Run every family in turn, and print the table and one JSON object."""
    from tests.helpers.families import FAMILIES, WRAPPERS
    from tests.helpers.whole_chain import CHECKS

    chosen = names or [*FAMILIES, *WRAPPERS]
    print(f"{'family':26}" + "".join(f"{check:>12}" for check in CHECKS))
    found = {}
    with ThreadPoolExecutor(2) as pool:
        for name, one in zip(chosen, pool.map(in_a_process, chosen), strict=True):
            found[name] = one
            more = one.get("refused") or one.get("error") or one.get("note") or ""
            print(f"{name:26}" + "".join(f"{one.get(check, '-'):>12}" for check in CHECKS) + f"  {more}", flush=True)
    print(json.dumps({"soak": "families", "families": found}))


def in_a_process(name: str) -> dict[str, Any]:
    """`one_family` in a process that may crash or hang."""
    with tempfile.TemporaryDirectory(prefix="qcft-") as place:
        command = [sys.executable, __file__, "--one", name, place]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return {"error": f"still at it after {SECONDS} s"}
    if done.returncode:
        return {"error": done.stderr.strip()[-300:]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        from tests.helpers.whole_chain import one_family

        print(json.dumps(one_family(sys.argv[2], Path(sys.argv[3]))))
    else:
        main(sys.argv[1:])
