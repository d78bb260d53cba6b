"""The cost of the live probe: the same training with and without it, on SmolLM2-135M and data that ships with qcft.

    python tests/benchmarks/probe.py [--rounds 3] [--rows 60] [--epochs 3] [--frozen 20]

The model trains on Spanish passages and is probed on English instructions with qcft's default schedule; once with no
layer frozen, once with the lowest ones. The cost is the additional training time, printed next to the probe's own
measurement of its time.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--epochs", type=int, default=3, help="in fewer, probes would cost over 5%%")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--frozen", type=int, default=20)
    options = parser.parse_args()
    from qcft.models.load import quiet_libraries

    quiet_libraries()
    figures = {}
    for freeze in ("none", f"first:{options.frozen}"):
        train(options, freeze, probed=True)  # warm-up
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(options.rounds):
            for probed in seconds:
                took, found = train(options, freeze, probed)
                seconds[probed].append(took)
                print(f"{freeze}, {'probed' if probed else 'plain'}: {took:.1f} s", file=sys.stderr)
        plain, probed = (statistics.median(seconds[key]) for key in (False, True))
        own = found["share_of_time"]
        print(
            f"freeze {freeze}: {plain:.1f} s plain, {probed:.1f} s with {len(found['probes'])} probes of "
            f"{found['rows']} rows: {probed / plain - 1:.1%} more; by the probe's own clock {own:.1%} of the training"
        )
        figures[f"cost_{freeze}"] = figure(probed / plain - 1)
        figures[f"own_clock_{freeze}"] = figure(own)
    print(json.dumps({"benchmark": "probe", "figures": figures, "machine": platform.platform()}))


def figure(share: float) -> dict:
    return {"value": round(share, 4), "unit": "of the training's time", "goal": 0.05, "met": share <= 0.05}


def train(options: argparse.Namespace, freeze: str, probed: bool) -> tuple[float, dict | None]:
    """Seconds of one training, and the results of its probe."""
    from qcft.data.encode import Encoder
    from qcft.data.load import load_source
    from qcft.data.mix import mixed_order
    from qcft.events import Watch
    from qcft.layers import adapted_modules, decoder_layers, lowest_adapted
    from qcft.models.adapters import add_lora
    from qcft.models.load import load_model, load_tokenizer
    from qcft.models.sources import resolve, weights_folder
    from qcft.recipe import Forgetting, HeldOut, Lora, Model, Source, Train, parse_freeze
    from qcft.training.attention import attend_by_rows
    from qcft.training.batches import make_batches
    from qcft.training.probe import lay_out
    from qcft.training.sft import train_adapter
    from qcft.training.trainer import Shortcuts

    watch = Watch()
    folder = weights_folder(resolve(Model(name=options.model)), watch)
    tokenizer = load_tokenizer(folder, Model(name=options.model))
    encoder, held = Encoder(tokenizer), HeldOut()
    new = load_source(Source(path="qcft:passages/es", take=options.rows), held, watch)
    rows = list(encoder.encode_all(new.rows).encoded)
    english = encoder.encode_all(load_source(Source(path="qcft:instructions/en"), held, watch).held_out).encoded
    settings = Train(batch=8, epochs=options.epochs)
    batches = make_batches(rows, lambda epoch: mixed_order(len(rows), 0, f"0:{epoch}"), settings)
    model = load_model(folder, Model(name=options.model))
    modules = adapted_modules(model, "all-linear", parse_freeze(freeze), 0)
    adapted = add_lora(model, modules, Lora())
    below = lowest_adapted(model, modules)
    probing = lay_out(Forgetting(), english, batches, below / decoder_layers(model)[1]) if probed else None
    if probed and probing is None:
        sys.exit("too few rows for a probe within 5%: give more --rows or --epochs")
    shortcuts = Shortcuts(below, attend_by_rows(model, max(len(row.input_ids) for row in rows)))
    with tempfile.TemporaryDirectory() as place:
        begun = time.monotonic()
        done = train_adapter(
            adapted, tokenizer, batches, settings, 0, Path(place), watch, "training", shortcuts, probing
        )
        return time.monotonic() - begun, done.forgetting


if __name__ == "__main__":
    main()
