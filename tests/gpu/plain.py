"""The code that qcft is compared with, from the libraries' documentation; it does not use qcft.

python -m tests.gpu.plain train MODEL ROWS --batch B --steps N --frozen K     TRL + PEFT in NF4, its defaults
python -m tests.gpu.plain generate MODEL ROWS --count C --new N --batches B,B   transformers' generate in NF4

ROWS: JSON Lines of prompt and completion. The last line printed is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load(folder: str) -> tuple[Any, Any]:
    """A tokenizer and its model in NF4 with double quantization."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    where = {"": "cuda" if torch.cuda.is_available() else "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization, device_map=where
    )
    return AutoTokenizer.from_pretrained(folder), model


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each optimizer step, losses, and the peak in bytes since the model was loaded."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    tokenizer, model = load(options.model)
    set_seed(0)
    layers = list(range(options.frozen, model.config.num_hidden_layers))
    config = LoraConfig(r=16, lora_alpha=32, target_modules=MODULES, layers_to_transform=layers, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    ends: list[float] = []  # of the steps; first the start of the training
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends.append(now())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(now())

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as place:
        settings = SFTConfig(
            output_dir=place,
            per_device_train_batch_size=options.batch,
            max_steps=options.steps,
            learning_rate=2e-4,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not cuda,
            bf16=True,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        rows = [encoded(tokenizer, row) for row in read(options.rows)[: options.batch * options.steps]]
        trainer = SFTTrainer(
            model=adapted, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.add_callback(Clock())
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    return {"step_seconds": [round(b - a, 4) for a, b in pairwise(ends)], "losses": losses, "peak": peak()}


def encoded(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """A row's tokens up to its end of turn; those of the prompt have no loss."""
    user = {"role": "user", "content": row["prompt"]}
    turns = [user, {"role": "assistant", "content": row["completion"]}]
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    ids, before = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in (text, prompt))
    return {"input_ids": ids, "labels": [-100] * len(before) + ids[len(before) :]}


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """Answer tokens per second for each batch size: sampled, in the file's order, counted up to the end of turn."""
    import torch

    tokenizer, model = load(options.model)
    model.eval()
    tokenizer.padding_side = "left"
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        for row in read(options.rows)[: options.count]
    ]

    def answer(batch: int, new: int) -> int:
        tokens = 0
        for start in range(0, len(texts), batch):
            inputs = tokenizer(
                texts[start : start + batch], padding=True, add_special_tokens=False, return_tensors="pt"
            ).to(model.device)
            made = model.generate(
                **inputs, max_new_tokens=new, do_sample=True, temperature=0.7, top_p=0.9, top_k=0,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            for one in made[:, inputs["input_ids"].shape[1] :].tolist():
                tokens += one.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in one else len(one)
        return tokens

    found: dict[str, Any] = {}
    for batch in map(int, options.batches.split(",")):
        answer(batch, 4)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        start = now()
        tokens = answer(batch, options.new)
        seconds = now() - start
        found[f"batch {batch}"] = {
            "tokens": tokens,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(tokens / seconds, 1),
            "peak_gib": round(peak() / 2**30, 3),
        }
    return found


def read(path: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def now() -> float:
    """The time in seconds, after the card's work is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def peak() -> int:
    """The peak memory in bytes: on the card, or of this process."""
    import resource

    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["train", "generate"])
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--frozen", type=int, default=0)
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--batches", default="64")
    options = parser.parse_args()
    print(json.dumps({"train": train, "generate": generate}[options.what](options)))


if __name__ == "__main__":
    main()
