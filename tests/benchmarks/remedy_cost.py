"""The cost of remedies during training: time of an optimizer step and peak memory, side by side.

    python tests/benchmarks/remedy_cost.py [--rounds 3] [--steps 4] [--model FOLDER_OR_NAME] [--frozen 20]
                                           [--shape 1B|3B|8B]

--shape: a model of that shape with random weights, made on the card, its lower half frozen.
Every variant trains on the same new rows (256 tokens, 4 per step, half of the tokens are answer); with replay, one row
of the same length is added to each step: 0.2 of the mix. Replay rows are data that ships with qcft, as their origin
does not change the cost of training on them; generation is not included (tests/benchmarks/replay.py). NF4, adapters
above the frozen layers, no stored states. Variants run in turn, each in its own process; a round's result is the median
step after the first. Peak memory is the process's resident set in training (CUDA: memory allocated).
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from freezing import LENGTH, LR, RANK, measured, modules_of, now, quiet, text_rows
from shapes import model_of

NEW = 4  # rows of a step
VARIANTS = {
    "none": "no remedy",
    "replay": "generative replay 0.2",
    "distilled": "the same, distilled",
    "anchor": "anchor target-masked",
    "both": "distilled replay and anchor",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps of a round, the first not counted")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--frozen", type=int, default=20)
    parser.add_argument("--shape", help="1B, 3B or 8B: random weights of that shape, the lower half frozen")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(train(options.one, options)))
        return
    with model_of(options.shape, half_frozen=True):
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Run all variants in turn and report."""
    rounds: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    for number in range(options.rounds):
        for variant in VARIANTS:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--one", variant], capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(done.stderr)
            rounds[variant].append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"round {number + 1}: {VARIANTS[variant]}: {rounds[variant][-1]['step']:.2f} s a step", file=sys.stderr
            )
    report(rounds)


def train(variant: str, options: argparse.Namespace) -> dict:
    """Train one variant; seconds per step and peak memory."""
    quiet()
    from transformers import set_seed

    from qcft.events import Progress, Watch
    from qcft.models.adapters import add_lora
    from qcft.models.load import load_model, load_tokenizer
    from qcft.models.sources import resolve, weights_folder
    from qcft.recipe import Anchor, Lora, Model, Train
    from qcft.training.attention import attend_by_rows
    from qcft.training.batches import make_batches
    from qcft.training.reference import Terms
    from qcft.training.sft import train_adapter
    from qcft.training.trainer import Shortcuts

    folder = weights_folder(resolve(Model(name=options.model)), Watch())
    tokenizer = load_tokenizer(folder, Model(name=options.model))
    rows = text_rows(tokenizer, (NEW + 1) * options.steps)
    each = NEW + (variant in {"replay", "distilled", "both"})  # the same new rows, with and without replay
    rows = [replace(row, replay=i % (NEW + 1) == NEW) for i, row in enumerate(rows) if i % (NEW + 1) < each]
    settings = Train(
        lr=LR, scheduler="constant", warmup=0, batch=each, micro_batch=each, packing=False, max_length=LENGTH,
        gradient_checkpointing=False, prefix_cache=False, checkpoint_steps=10**6,
    )  # fmt: skip
    terms = Terms(Anchor() if variant in {"anchor", "both"} else None, variant in {"distilled", "both"})
    model = load_model(folder, Model(name=options.model))
    set_seed(0)
    adapted = add_lora(model, modules_of(model, options.frozen), Lora(r=RANK))
    shortcuts = Shortcuts(options.frozen, attend_by_rows(model, LENGTH), shared=options.frozen)
    batches = make_batches(rows, lambda epoch: list(range(len(rows))), settings)
    ends: list[float] = []
    times: list[float] = []

    def listen(event):
        if isinstance(event, Progress) and event.label == "training":
            ends.append(now())

    def run():
        ends.append(now())
        with tempfile.TemporaryDirectory() as place:
            train_adapter(
                adapted, tokenizer, batches, settings, 0, Path(place), Watch(listen), "training", shortcuts, terms=terms
            )
        times.extend(b - a for a, b in itertools.pairwise(ends))

    return measured(run, adapted, options.frozen, None, times, [])


def report(rounds: dict[str, list[dict]]) -> None:
    """Print the table, and the results as one line of JSON."""
    print(f"{'':32}{'s a step':>10}{'of no remedy':>14}{'peak GiB':>10}{'more, MiB':>11}")
    step = {variant: statistics.median(one["step"] for one in found) for variant, found in rounds.items()}
    peak = {variant: statistics.median(one["peak"] for one in found) for variant, found in rounds.items()}
    figures = {}
    for variant, title in VARIANTS.items():
        pairs = zip(rounds["none"], rounds[variant], strict=True)
        times = statistics.median(b["step"] / a["step"] for a, b in pairs)
        more = (peak[variant] - peak["none"]) / 2**20
        print(f"{title:32}{step[variant]:10.2f}{times:13.2f}x{peak[variant] / 2**30:10.2f}{more:11.0f}")
        figures[f"{variant}_seconds"] = figure(round(step[variant], 3), "s a step")
        figures[f"{variant}_time"] = figure(round(times, 3), "of no remedy")
        figures[f"{variant}_peak"] = figure(round(peak[variant] / 2**30, 3), "GiB")
    print(json.dumps({"benchmark": "remedy_cost", "figures": figures, "machine": platform.platform()}))


def figure(value: float, unit: str) -> dict:
    """A result without a goal."""
    return {"value": value, "unit": unit, "goal": None, "met": None}


if __name__ == "__main__":
    main()
