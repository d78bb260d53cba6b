"""Generating replay: qcft's batches compared with one prompt at a time and with a fixed batch of 16 in file order.

    python tests/benchmarks/replay.py [--model smollm2-135m-instruct] [--data FILE] [--prompts 64]
                                      [--max-new-tokens 256] [--runs 3] [--continuous] [--shape 1B|8B]

--shape: a model of that shape with random weights, made on the card; the one of 8B ends its answers, the others do not.
The 4-bit model answers the first prompts of a file like Alpaca's (default: the instructions that ship with qcft),
sampling at temperature 0.7 and top-p 0.9. Each way runs in its own process, in turn, so that its peak memory is
measured separately; loading and a warm-up are not timed. The plain ways call transformers' `generate`; --continuous
adds its `generate_batch`. Answer tokens are counted up to the end of turn. One at a time answers every eighth prompt.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time

from shapes import model_of

WAYS = {"one": "one at a time", "sixteen": "fixed batch of 16, file order", "qcft": "qcft, chunk of 64"}
CONTINUOUS = {"continuous": "transformers generate_batch"}


def one_way(way: str, options: argparse.Namespace) -> dict:
    """Answer tokens, seconds and peak memory of one way, in this process."""
    import torch

    from qcft.data.encode import Encoder
    from qcft.data.load import read_pool
    from qcft.events import Watch
    from qcft.models.generate import Sampling, answer_batches
    from qcft.models.load import evaluating, load_model, load_tokenizer, peak_memory, quiet_libraries
    from qcft.models.sources import resolve, weights_folder
    from qcft.recipe import Model, Source

    quiet_libraries()
    named = Model(name=options.model)
    folder = weights_folder(resolve(named), Watch())
    tokenizer = load_tokenizer(folder, named)
    model = load_model(folder, named)
    encoder = Encoder(tokenizer)
    source = Source(path=options.data, take=options.prompts)
    prompts = [encoder.prompt_ids(row) for row in read_pool(source, False, Watch()).rows]
    most, pad, ends = options.max_new_tokens, tokenizer.pad_token_id, encoder.end_ids

    def plain(batch: int, chosen: list[list[int]]) -> int:
        tokens = 0
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            width = max(map(len, part))
            made = model.generate(
                input_ids=torch.tensor([[pad] * (width - len(p)) + p for p in part], device=model.device),
                attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in part], device=model.device),
                max_new_tokens=most,
                do_sample=True,
                temperature=0.7,
                top_p=0.9,
                top_k=0,
                eos_token_id=ends,
                pad_token_id=pad,
            )
            for sequence in made[:, width:].tolist():
                tokens += next((i for i, t in enumerate(sequence) if t in ends), len(sequence))
        return tokens

    def continuous() -> int:
        from transformers import GenerationConfig

        config = GenerationConfig(
            max_new_tokens=most,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
            top_k=0,
            eos_token_id=ends,
            pad_token_id=pad,
        )
        return sum(
            sum(t not in ends for t in out.generated_tokens)
            for out in model.generate_batch(prompts, generation_config=config).values()
        )

    def ours(chosen: list[list[int]], limit: int) -> int:
        sampling = Sampling(limit, 0.7, 0.9, 0)
        answers, _ = answer_batches(model, tokenizer, chosen, ends, sampling, 64, lambda done, made: None)
        return sum(answer.tokens for answer in answers)

    with evaluating(model):
        ours(prompts[:2], 4)
        torch.manual_seed(0)
        begun = time.monotonic()
        tokens = {
            "one": lambda: plain(1, prompts[:: options.every]),
            "sixteen": lambda: plain(16, prompts),
            "qcft": lambda: sum(ours(prompts[i : i + 64], most) for i in range(0, len(prompts), 64)),
            "continuous": continuous,
        }[way]()
        seconds = time.monotonic() - begun
    return {"tokens": tokens, "seconds": seconds, "peak": peak_memory()[1], "memory": peak_memory()[0]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", default="qcft:instructions/en")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--every", type=int, default=8, help="one at a time answers every N-th prompt")
    parser.add_argument("--continuous", action="store_true")
    parser.add_argument("--shape", help="1B, 3B or 8B: random weights of that shape")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(one_way(options.way, options)))
        return
    with model_of(options.shape):
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Run all ways in turn and report."""
    ways = WAYS | (CONTINUOUS if options.continuous else {})
    found: dict[str, list[dict]] = {way: [] for way in ways}
    for _ in range(options.runs):
        for way in ways:
            done = subprocess.run([sys.executable, *sys.argv, "--way", way], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    speed = {way: statistics.median(r["tokens"] / r["seconds"] for r in runs) for way, runs in found.items()}
    peak = {way: max(r["peak"] for r in runs) / 2**30 for way, runs in found.items()}
    print(f"{options.prompts} prompts, at most {options.max_new_tokens} tokens, median of {options.runs} runs\n")
    print(f"{'':32}{'answer tokens/s':>16}{'peak GiB':>10}{'tokens':>9}{'qcft is':>9}")
    for way, name in ways.items():
        times = f"{speed['qcft'] / speed[way]:.2f}x"
        print(f"{name:32}{speed[way]:16.1f}{peak[way]:10.2f}{found[way][-1]['tokens']:9}{times:>9}")
    goals = {"one": 6.0, "sixteen": 1.3}
    figures = {}
    for way in ways:
        figures[f"tokens_per_second_{way}"] = {
            "value": round(speed[way], 1),
            "unit": "tokens/s",
            "goal": None,
            "met": None,
        }
        figures[f"peak_{way}"] = {"value": round(peak[way], 2), "unit": "GiB", "goal": None, "met": None}
        if way in goals:
            times = speed["qcft"] / speed[way]
            figures[f"times_{way}"] = {
                "value": round(times, 2),
                "unit": "x",
                "goal": goals[way],
                "met": times >= goals[way],
            }
    print(json.dumps({"benchmark": "replay", "figures": figures, "machine": platform.platform()}))


if __name__ == "__main__":
    main()
