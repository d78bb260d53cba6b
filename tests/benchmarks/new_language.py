"""A language that the model hardly knows: instructions only, and after raw text, each with and without replay.

    python tests/benchmarks/new_language.py --text FILE --instructions FILE [--english FILE] [--lang ja]
        [--model smollm2-135m-instruct] [--take 400] [--rows 100] [--held 100] [--seeds 0] [--runs DIR]
        [--set KEY=VALUE]...

`--text`: one document per line (.txt, also .gz); the model trains on `take` of them, and `held` are held out.
`--instructions`: it trains on `rows` of them, and `held` are held out. `--english`: English prompts for replay
(default: those that ship with qcft, repeated if they are too few). Replay is generative, 0.2 of the tokens with loss,
in each phase. Prints the results of each arm on rows that none trains on: bits per byte of the text, and NLL in nats
per token of the text, of instructions in the language and of English dialogues; means over seeds, with the lowest and
the highest. With --runs, an interrupted measurement resumes.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

import qcft

REPLAY = ("text.replay", "instructions.replay")
ARMS = {
    "instructions": {"text": None, REPLAY[1]: None},
    "instructions, replay": {"text": None},
    "text, instructions": dict.fromkeys(REPLAY),
    "text, instructions, replay": {},
}
KEYS = {name: name.replace(", ", "-") for name in ARMS}


def recipe(options: argparse.Namespace) -> dict:
    """The ablation's recipe as plain data."""
    replay = {
        "ratio": 0.2, "unit": "tokens", "data": [{"path": options.english, "lang": "en", "take": 2000}],
        "max_new_tokens": 128, "on_shortfall": "repeat",
    }  # fmt: skip
    train = {"lr": 5e-4, "batch": 8, "micro_batch": "auto", "max_length": 384}
    text = {"path": options.text, "sample_by": "line", "format": "text", "lang": options.lang, "take": options.take}
    rows = {"path": options.instructions, "lang": options.lang, "take": options.rows}
    return {
        "name": "new-language",
        "model": {"name": options.model},
        "heldout": {
            "share": 0.2, "rows": options.held, "data": [{"path": "qcft:dialogues/en", "lang": "en"}]
        },
        "answers": {"prompts": 0},
        "merge": {"refuse_below": None},
        "forgetting": None,
        "phases": [
            {"name": "text", "data": [text], "replay": replay, "train": train},
            {"name": "instructions", "data": [rows], "replay": replay, "train": train},
        ],
        "ablation": {
            "seeds": [int(seed) for seed in options.seeds.split(",")],
            "arms": [{"name": KEYS[name], "set": settings} for name, settings in ARMS.items()],
        },
    }  # fmt: skip


def measured(stage: dict, lang: str) -> dict[str, float]:
    """The results of a stage."""
    text, english = stage["groups"][f"text {lang} text"], stage["groups"]["test en"]
    return {
        "bits_per_byte": text["bits_per_byte"],
        "text_nll": text["nll"],
        "instructions_nll": stage["groups"][f"instructions {lang}"]["nll"],
        "english_nll": english["nll"],
    }


def report(found: dict[str, list[dict[str, float]]]) -> None:
    """Print the table, and the results as one line of JSON."""
    keys = list(next(iter(found.values()))[0])
    print(f"{'':30}" + "".join(f"{key:>28}" for key in keys))
    figures = {}
    for name, runs in found.items():
        cells = []
        for key in keys:
            values = [one[key] for one in runs]
            mean = sum(values) / len(values)
            cells.append(f"{mean:.3f} [{min(values):.3f}, {max(values):.3f}]" if len(values) > 1 else f"{mean:.3f}")
            unit = "bits per byte" if key == "bits_per_byte" else "nats per token"
            figures[f"{KEYS.get(name, name)} {key}"] = {
                "value": round(mean, 4),
                "unit": unit,
                "goal": None,
                "met": None,
            }
        print(f"{name:30}" + "".join(f"{cell:>28}" for cell in cells))
    print(json.dumps({"benchmark": "new_language", "figures": figures, "machine": platform.platform()}))


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("text", "instructions"):
        parser.add_argument(f"--{name}", required=True)
    for name, default in (("english", "qcft:instructions/en"), ("lang", "ja"), ("model", "smollm2-135m-instruct")):
        parser.add_argument(f"--{name}", default=default)
    for name, number in (("take", 400), ("rows", 100), ("held", 100)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--runs", help="where the runs are kept (default: nowhere)")
    parser.add_argument("--set", action="append", default=[], help="change the recipe of every arm")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        measure(options, Path(options.runs or place))


def measure(options: argparse.Namespace, runs: Path) -> None:
    """Run what is not done yet, and print the results."""
    raw = recipe(options)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(raw, file)
        file.flush()
        sets = [one for text in options.set for one in ("--set", text)]
        command = [sys.executable, "-m", "qcft", "ablate", file.name, "--runs", str(runs), *sets]
        if code := subprocess.run(command, stdout=sys.stderr).returncode:
            sys.exit(code)
    found: dict[str, list[dict[str, float]]] = {}
    for name, key in KEYS.items():
        for seed in raw["ablation"]["seeds"]:
            stages = qcft.open(f"new-language-{key}-s{seed}", runs=runs).table["stages"]
            base = next(stage for stage in stages if stage["stage"] == "eval/base")
            found.setdefault("base, NF4", [measured(base, options.lang)])
            found.setdefault(name, []).append(measured(stages[-1], options.lang))
    report(found)


if __name__ == "__main__":
    main()
