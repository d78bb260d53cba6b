"""What freezing saves: a plain TRL + PEFT script against qcft, the first 20 of SmolLM2-135M's 30 layers frozen.

    python tests/benchmarks/freezing.py [--rounds 3] [--steps 5] [--model FOLDER_OR_NAME] [--frozen 20] [--shape 1B|8B]

--shape: a model of that shape with random weights, made on the card, its lower half frozen.
Same rows (256 tokens, 4 per step), same adapters on the same modules with the same initial values, NF4. Variants run
in turn, each in its own process; a round's result is the median step after the first. Peak memory is the process's
resident set in training (CUDA: memory allocated). Also measured: time and peak memory of `snr` over the model.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from shapes import model_of

VARIANTS = {
    "plain": "plain TRL + PEFT",
    "checkpointing": "qcft, checkpointing on",
    "qcft": "qcft, checkpointing off",
    "cached": "qcft, prefix cache, from the 2nd epoch",
}
GOALS = {"checkpointing": 1.25, "qcft": 1.4, "cached": 2.2}
BATCH, LENGTH, RANK, LR = 4, 256, 16, 2e-4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="steps of a round, the first not counted")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--frozen", type=int, default=20)
    parser.add_argument("--shape", help="1B, 3B or 8B: random weights of that shape, the lower half frozen")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        work = {"snr": snr}.get(options.one, lambda o: train(options.one, o))
        print(json.dumps(work(options)))
        return
    with model_of(options.shape, half_frozen=True):
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Run all variants in turn and report."""
    rounds: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    for number in range(options.rounds):
        for variant in VARIANTS:
            rounds[variant].append(in_process(variant))
            print(
                f"round {number + 1}: {VARIANTS[variant]}: {rounds[variant][-1]['step']:.2f} s a step", file=sys.stderr
            )
    saved = {
        variant: in_process(f"{variant}+saved", steps=1)["saved"] for variant in ("plain", "checkpointing", "qcft")
    }
    report(rounds, saved, in_process("snr"))


def in_process(one: str, steps: int | None = None) -> dict:
    """The results of one variant, in its own process."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", one]
    done = subprocess.run([*command, *(["--steps", str(steps)] if steps else [])], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def train(one: str, options: argparse.Namespace) -> dict:
    """Train one variant; seconds per step, losses, peak memory, and optionally the bytes saved below the boundary."""
    variant, _, count = one.partition("+")
    quiet()
    from qcft.events import Watch
    from qcft.models.load import load_tokenizer
    from qcft.models.sources import resolve, weights_folder
    from qcft.recipe import Model

    folder = weights_folder(resolve(Model(name=options.model)), Watch())
    tokenizer = load_tokenizer(folder, Model(name=options.model))
    rows = text_rows(tokenizer, BATCH * options.steps)
    with tempfile.TemporaryDirectory() as place:
        run = plain if variant == "plain" else ours
        return run(variant, folder, tokenizer, rows, options, Path(place), Saved() if count else None)


def plain(variant, folder, tokenizer, rows, options, place, saved) -> dict:
    """The code of TRL's documentation, with its defaults; only the rows are not shuffled."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": "cuda" if cuda else "cpu"}
    )
    model.train()
    set_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=32, target_modules=modules_of(model, options.frozen), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    times: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            times.append(-now())

        def on_step_end(self, *_, **__):
            times[-1] += now()

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                losses.append(logs["loss"])

    settings = SFTConfig(
        output_dir=str(place),
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        lr_scheduler_type="constant",
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not cuda,
        bf16=True,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    data = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
    trainer = SFTTrainer(model=adapted, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.add_callback(Clock())
    return measured(trainer.train, adapted, options.frozen, saved, times, losses)


def ours(variant, folder, tokenizer, rows, options, place, saved) -> dict:
    """qcft's own training of a phase."""
    from transformers import set_seed

    from qcft.events import Progress, Watch
    from qcft.models.adapters import add_lora
    from qcft.models.load import load_model
    from qcft.recipe import Lora, Model, Train
    from qcft.steps.prefix import open_prefix
    from qcft.store import Store
    from qcft.training.attention import attend_by_rows
    from qcft.training.batches import make_batches
    from qcft.training.sft import train_adapter
    from qcft.training.trainer import Shortcuts

    settings = Train(
        lr=LR,
        scheduler="constant",
        warmup=0,
        optimizer="adamw_torch_fused",  # TRL's default
        batch=BATCH,
        micro_batch=BATCH,
        packing=False,
        max_length=LENGTH,
        gradient_checkpointing=variant == "checkpointing",
        prefix_cache=variant == "cached",
        checkpoint_steps=10**6,
    )
    model = load_model(folder, Model(name=options.model))
    set_seed(0)
    adapted = add_lora(model, modules_of(model, options.frozen), Lora(r=RANK))
    by_rows = attend_by_rows(model, LENGTH)
    batches = make_batches(rows, lambda epoch: list(range(len(rows))), settings)
    begun = now()
    prefix = open_prefix(
        model, options.frozen, rows, batches.rows, {"weights": "bench"}, settings, Store(place), Watch()
    )
    filled = now() - begun
    ends: list[float] = []
    losses: list[float] = []

    def listen(event):
        if isinstance(event, Progress) and event.label == "training":
            ends.append(now())

    def run():
        ends.append(now())
        shortcuts = Shortcuts(options.frozen, by_rows, prefix)
        train_adapter(adapted, tokenizer, batches, settings, 0, place, Watch(listen), "training", shortcuts)
        losses.extend(json.loads(line)["loss"] for line in (place / "log.jsonl").read_text().splitlines())
        times.extend(b - a for a, b in itertools.pairwise(ends))

    times: list[float] = []
    return {**measured(run, adapted, options.frozen, saved, times, losses), "fill": filled / options.steps}


def measured(run, model, frozen, saved, times, losses) -> dict:
    """Run a training and collect its results; it fills `times` and `losses`."""
    import torch

    clear_peak()
    if saved is not None:
        with saved.watching(model.get_base_model().model.layers, frozen):
            run()
    else:
        run()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()
    step = statistics.median(times[1:] or times)
    return {"step": step, "losses": losses, "peak": peak, "saved": saved.bytes if saved else None}


class Saved:
    """Bytes of activations that autograd saves while the layers below a boundary run."""

    def __init__(self) -> None:
        self.bytes = 0
        self.below = True

    def watching(self, layers, boundary):
        import torch

        layers[0].register_forward_pre_hook(lambda *_: setattr(self, "below", True))
        layers[boundary].register_forward_pre_hook(lambda *_: setattr(self, "below", False))

        def keep(tensor):
            if self.below and not isinstance(tensor, torch.nn.Parameter):
                self.bytes += tensor.numel() * tensor.element_size()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)


def snr(options: argparse.Namespace) -> dict:
    """Seconds and peak resident memory of the signal-to-noise ratios of all linear modules."""
    from qcft.events import Watch
    from qcft.layers import linear_modules
    from qcft.layers.snr import measure_snr
    from qcft.models.meta import model_without_weights
    from qcft.models.sources import resolve, weights_folder
    from qcft.recipe import Model

    model = Model(name=options.model)
    folder = weights_folder(resolve(model), Watch())
    without_weights = model_without_weights(folder, model)
    names = [module.name for module in linear_modules(without_weights)]
    clear_peak()
    begun = now()
    ratios = measure_snr(folder, without_weights, names, Watch())
    return {"seconds": now() - begun, "peak": peak_bytes(), "matrices": len(ratios)}


def text_rows(tokenizer, count):
    """Rows of exactly LENGTH tokens from data that ships with qcft; the second half of each has loss."""
    from qcft.data.encode import IGNORED, EncodedRow
    from qcft.data.load import load_source
    from qcft.events import Watch
    from qcft.recipe import HeldOut, Source

    text = ""
    for path in ("qcft:passages/es", "qcft:passages/en", "qcft:instructions/es", "qcft:instructions/en"):
        source = load_source(Source(path=path, lang="es"), HeldOut(), Watch())
        text += "\n".join(turn.content for row in source.rows for turn in (*row.prompt, *row.completion)) + "\n"
    ids = tokenizer(text)["input_ids"]
    ids = (ids * (1 + count * LENGTH // len(ids)))[: count * LENGTH]
    half = LENGTH // 2
    return [
        EncodedRow(ids[i : i + LENGTH], [IGNORED] * half + ids[i + half : i + LENGTH])
        for i in range(0, count * LENGTH, LENGTH)
    ]


def modules_of(model, frozen):
    from qcft.layers import adapted_modules
    from qcft.recipe import parse_freeze

    return adapted_modules(model, "all-linear", parse_freeze(f"first:{frozen}"), 0)


def report(rounds, saved, ratios) -> None:
    """Print the table, and the results as one line of JSON."""
    step = {variant: statistics.median(r["step"] for r in found) for variant, found in rounds.items()}
    peak = {variant: max(r["peak"] for r in found) / 2**30 for variant, found in rounds.items()}
    losses = {variant: found[0]["losses"] for variant, found in rounds.items()}
    print(
        f"{'':42}{'s a step':>10}{'tokens/s':>10}{'faster':>9}{'peak GiB':>10}{'loss differs':>14}{'saved below':>13}"
    )
    figures = {}
    for variant, title in VARIANTS.items():
        faster = statistics.median(a["step"] / b["step"] for a, b in zip(rounds["plain"], rounds[variant], strict=True))
        differs = max(abs(a - b) / a for a, b in zip(losses["plain"], losses[variant], strict=True))
        kept = "" if variant not in saved else f"{saved[variant] / 2**20:.0f} MiB"
        rate = BATCH * LENGTH / step[variant]
        print(
            f"{title:42}{step[variant]:10.2f}{rate:10,.0f}{faster:8.2f}x{peak[variant]:10.2f}{differs:13.2%}{kept:>13}"
        )
        goal = GOALS.get(variant)
        if goal:
            figures[f"{variant}_faster"] = {"value": round(faster, 2), "unit": "x", "goal": goal, "met": faster >= goal}
            figures[f"{variant}_loss_differs"] = {"value": round(differs, 5), "unit": "", "goal": None, "met": None}
    same = losses["cached"] == losses["qcft"] == losses["checkpointing"]
    fill = statistics.median(r["fill"] for r in rounds["cached"])
    print(f"qcft's own losses with and without checkpointing and cache: {'equal to the bit' if same else 'NOT equal'}")
    print(f"filling the cache, once: {fill:.2f} s for the rows of a step")
    print(f"snr: {ratios['matrices']} matrices in {ratios['seconds']:.1f} s, peak {ratios['peak'] / 1e9:.2f} GB")
    ratio = peak["checkpointing"] / peak["plain"]
    figures |= {
        "checkpointing_memory": {"value": round(ratio, 3), "unit": "of plain", "goal": 1.0, "met": ratio <= 1.0},
        "saved_below": {"value": saved["qcft"], "unit": "bytes", "goal": 0, "met": saved["qcft"] == 0},
        "own_losses_equal": {"value": same, "unit": "", "goal": True, "met": same},
        "snr_seconds": {"value": round(ratios["seconds"], 1), "unit": "s", "goal": 60, "met": ratios["seconds"] < 60},
        "snr_peak": {"value": round(ratios["peak"] / 1e9, 2), "unit": "GB", "goal": 1, "met": ratios["peak"] < 1e9},
    }
    print(json.dumps({"benchmark": "freezing", "figures": figures, "machine": platform.platform()}))


def now() -> float:
    """The time in seconds, after the GPU's work is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def clear_peak() -> None:
    """Reset the peak of the resident set."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The peak of the resident set."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def quiet() -> None:
    """Silence the libraries' messages."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    from qcft.models.load import quiet_libraries

    quiet_libraries()


if __name__ == "__main__":
    main()
