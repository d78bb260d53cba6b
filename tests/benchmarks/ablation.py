"""Eight arms of quick-ablation-cpu as one ablation, against eight runs on their own, each with its own runs folder.

    python tests/benchmarks/ablation.py [--repeats 1] [--set KEY=VALUE]...

The recipe's six arms, one with half the replay and one with Spectrum; few rows by default, see --set. Both ways run as
processes, as a user starts them; the adapters must be bitwise equal.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))

import yaml

from qcft.ablation.arms import prepare_arms
from qcft.events import Watch
from qcft.recipe import load_ablation, parse_assignments, read_recipe

FEW = {
    "heldout": {"share": 0.2, "rows": 4},
    "answers": {"prompts": 2, "max_new_tokens": 16},
    "phase1.data.0.take": 24,
    "phase2.data.0.take": 8,
    "phase2.data.0.lang": ["es", "pt"],
}
MORE = [
    {"name": "generative10", "set": {"phase2.replay": {"ratio": 0.1, "max_new_tokens": 96, "chunk": 30}}},
    {"name": "spectrum", "set": {"phase2.freeze": "snr:0.5"}},
]


def timed(*arguments: str) -> float:
    """Seconds of `qcft ARGUMENTS`."""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "qcft", *arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return time.monotonic() - begun


def adapters(run: Path) -> dict[str, str]:
    """The digest of each phase's adapter."""
    files = sorted(run.glob("*/adapter/adapter_model.safetensors"))
    return {file.parts[-3]: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set", action="append", default=[], help="change the recipe")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    arms = [*read_recipe("quick-ablation-cpu")[0]["ablation"]["arms"], *MORE]
    changes = {**FEW, "ablation": {"arms": arms, "seeds": [0]}, **parse_assignments(options.set)}
    plain, every = load_ablation("quick-ablation-cpu", changes)
    recipes = {one.arm.recipe.name: one.arm.recipe for one in prepare_arms(every, Watch())}
    together, apart, same = [], [], 0
    for repeat in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            for name, recipe in {"all": plain, **recipes}.items():
                (place / f"{name}.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
            timed("run", str(place / "all.yaml"), "--runs", folder, "--dry-run")  # warm-up: files are read once
            together.append(timed("ablate", str(place / "all.yaml"), "--runs", str(place / "together")))
            single = [timed("run", str(place / f"{name}.yaml"), "--runs", str(place / name)) for name in recipes]
            apart.append(sum(single))
            found = {name: adapters(place / "together" / name) for name in recipes}
            same = sum(found[name] == adapters(place / name / name) and bool(found[name]) for name in recipes)
            print(f"{repeat + 1}: {len(recipes)} arms together {together[-1]:.0f} s, apart {apart[-1]:.0f} s")
            for name, seconds in zip(recipes, single, strict=True):
                print(f"   {name:40} {seconds:6.1f} s alone, adapters of {', '.join(found[name])}")
    ratio = median(together) / median(apart)
    print(f"together takes {ratio:.2f} of the time; adapters equal to the bit in {same} of {len(recipes)} arms")
    figures = {
        "time": {"value": round(ratio, 3), "unit": "of the separate runs'", "goal": 0.6, "met": ratio <= 0.6},
        "equal_arms": {
            "value": same,
            "unit": f"of {len(recipes)} arms",
            "goal": len(recipes),
            "met": same == len(recipes),
        },
    }
    print(json.dumps({"benchmark": "ablation", "figures": figures, "machine": platform.platform()}))


if __name__ == "__main__":
    main()
