"""How much of a real phase 1 on SmolLM2-135M is left after qcft's merge, in a stack, and after PEFT's 4-bit merge.

    python tests/benchmarks/kept.py --data en=alpaca_en.jsonl.gz --data es=multialpaca/es.jsonl.gz [--take 300]

One phase 1 for each data set. Measured is the share of the gain in mean NLL on its held-out rows, with every model
loaded in NF4: in the merged model; in a stack, with phase 1's adapter live under a new one; and in the model that
PEFT's merge_and_unload makes from the 4-bit one.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

from qcft import api, deliveries
from qcft.data.encode import Encoder
from qcft.events import StepEnded, Watch
from qcft.files import read_json
from qcft.layers import adapted_modules
from qcft.measure.distance import compare, predictions
from qcft.measure.score import RowScore, score_rows
from qcft.measure.stats import kept, mean_nll
from qcft.models.adapters import add_lora_over, load_stack
from qcft.models.load import load_model
from qcft.prepare.prepared import Prepared
from qcft.recipe import parse_freeze, recipe_from


def show(event: object) -> None:
    if isinstance(event, StepEnded):
        print(f"  {event.title}: {event.seconds:.0f} s  {event.summary}", file=sys.stderr)


def one(lang: str, path: str, take: int, runs: Path, model: str, changes: dict) -> dict[str, float]:
    """The shares left of the gain of a phase 1 on one data set."""
    raw = {
        "name": f"kept-{lang}",
        "model": model,
        "answers": {"prompts": 0},
        "merge": {"refuse_below": None},
        "phases": [
            {
                "name": "phase1",
                "data": [{"path": path, "lang": lang, "take": take}],
                "train": {"lr": 5e-4, "epochs": 1, "batch": 4, "max_length": 384},
            }
        ],
    }
    recipe = recipe_from(raw, changes)
    watch = Watch(show)
    api.run_watched(recipe, runs, watch)
    found = deliveries.merge(recipe.name, None, runs, watch)
    run = api.read(recipe.name, runs)
    group = next(g for g in run.table["groups"] if g["phase"] == "phase1")["name"]
    prepared = Prepared(recipe, watch)
    held = next(g for g in prepared.groups if g.name == group)
    rows = Encoder(prepared.tokenizer, held.system, held.max_length, held.long_rows).encode_all(held.rows).encoded
    base, live = (
        [RowScore(e["nll"], e["tokens"], e["correct"]) for e in read_json(run.stages[s].folder / "scores.json")[group]]
        for s in ("eval/base", "eval/phase1")
    )
    adapter = run.stages["phase1"].folder / "adapter"
    merged4 = load_stack(load_model(prepared.folder, recipe.model), [adapter]).merge_and_unload()
    in_4_bits = score_rows(merged4, rows, watch, "PEFT's merge into 4 bits")
    del merged4
    alone = load_stack(load_model(prepared.folder, recipe.model), [adapter])
    seen = predictions(alone, rows, watch, "live")
    del alone
    bare = load_model(prepared.folder, recipe.model)
    over = add_lora_over(bare, [adapter], adapted_modules(bare, "all-linear", parse_freeze("none"), 0), recipe.lora)
    distance = compare(over, rows, seen, watch, "stacked")
    stacked = score_rows(over, rows, watch, "stacked")
    shares = {
        "merged": found["kept"]["share"],
        "stacked": kept(base, live, stacked).share,
        "PEFT into 4 bits": kept(base, live, in_4_bits).share,
    }
    print(
        f"\n{lang}: {take} rows; NLL on {len(rows)} held-out rows: base {mean_nll(base):.4f}, live {mean_nll(live):.4f}"
    )
    for name, share in shares.items():
        print(f"  {name:18} kept {'not measurable' if share is None else f'{share:.3f}'}")
    print(f"  merged: KL {found['kept']['kl']:.4f}, greedy agreement {found['kept']['agreement']:.3f}")
    print(f"  stacked: KL {distance.kl:.6f}, greedy agreement {distance.agreement:.3f}")
    return {**shares, "stacked KL": distance.kl}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", action="append", required=True, metavar="LANG=PATH")
    parser.add_argument("--take", type=int, default=300)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--set", action="append", default=[], help="change the recipe")
    options = parser.parse_args()
    from qcft.recipe import parse_assignments

    figures = {}
    with tempfile.TemporaryDirectory() as runs:
        for source in options.data:
            lang, _, path = source.partition("=")
            changes = parse_assignments(options.set)
            found = one(lang, str(Path(path).absolute()), options.take, Path(runs) / "runs", options.model, changes)
            goals = {"merged": 0.85, "stacked": 1.0, "PEFT into 4 bits": None}
            for name, goal in goals.items():
                share = found[name]
                figures[f"kept_{name.replace(' ', '_')}_{lang}"] = {
                    "value": None if share is None else round(share, 4),
                    "unit": "share",
                    "goal": goal,
                    "met": None if goal is None or share is None else share >= goal,
                }
            figures[f"kl_stacked_{lang}"] = {
                "value": found["stacked KL"],
                "unit": "nats per answer token",
                "goal": 0,
                "met": found["stacked KL"] == 0,
            }
    print(json.dumps({"benchmark": "kept", "figures": figures, "machine": platform.platform()}))


if __name__ == "__main__":
    main()
