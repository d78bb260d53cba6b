"""Whether qcft's scores equal lm-eval's own in every digit, on real weights and local copies of the data.

"By hand" means lm-eval's `simple_evaluate` with a YAML file that includes the original task and reads the local file,
and a model loaded by transformers; then qcft scores the same model on the same files. Both use the chat template.

    python tests/benchmarks/by_hand.py --data ../shared/data [--limit 100] [--quantize nf4]

--data holds hellaswag/validation.jsonl.gz, mmlu/{test,dev}.jsonl.gz and xquad/es.jsonl.gz with the hub's columns.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

MODEL = "smollm2-135m-instruct"
FILES = {"hellaswag": "hellaswag/validation.jsonl.gz", "mmlu": "mmlu", "xquad_es": "xquad/es.jsonl.gz"}
BATCH = 16


def by_hand(task: str, data: Path, limit: int, model: Any, weights: Path) -> dict[str, float]:
    """lm-eval's scores. Each of mmlu's 57 tasks reads the file of its subject."""
    import lm_eval.tasks
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from qcft.measure.squad import stand_in

    stand_in()  # xquad's scores, which transformers no longer has
    place = Path(lm_eval.tasks.__file__).parent
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if task == "mmlu":
            names = write_mmlu(place / "mmlu" / "default", data / FILES[task], folder)
            limit = math.ceil(limit / len(names))
        else:
            (original,) = place.glob(f"{task.split('_')[0]}/{task}.yaml")
            file = str((data / FILES[task]).resolve())
            write_task(folder, task, original, {"train": file, "validation": file})
            names = [task]
        found = simple_evaluate(
            HFLM(pretrained=model, tokenizer=str(weights), batch_size=BATCH),
            tasks=[f"local_{name}" for name in names],
            task_manager=TaskManager(include_defaults=False, include_path=folder),
            limit=limit,
            apply_chat_template=True,
            bootstrap_iters=0,
        )
    results = [found["results"][f"local_{name}"] for name in names]
    sizes = [found["n-samples"][f"local_{name}"]["effective"] for name in names]
    keys = [key for key in results[0] if key.endswith(",none") and "_stderr" not in key]
    return {
        key.removesuffix(",none"): sum(r[key] * n for r, n in zip(results, sizes, strict=True)) / sum(sizes)
        for key in keys
    }


def write_mmlu(originals: Path, data: Path, folder: Path) -> list[str]:
    """Write a YAML file and data for each of mmlu's tasks; returns their names."""
    rows: dict[str, dict[str, list[str]]] = {}
    for split in ("test", "dev"):
        with gzip.open(data / f"{split}.jsonl.gz", "rt", encoding="utf-8") as stream:
            for line in stream:
                rows.setdefault(json.loads(line)["subject"], {}).setdefault(split, []).append(line)
    names = []
    for subject, splits in sorted(rows.items()):
        files = {split: folder / f"{subject}-{split}.jsonl" for split in splits}
        for split, lines in splits.items():
            files[split].write_text("".join(lines), encoding="utf-8")
        name = f"mmlu_{subject}"
        write_task(folder, name, originals / f"{name}.yaml", {split: str(file) for split, file in files.items()})
        names.append(name)
    return names


def write_task(folder: Path, name: str, original: Path, files: dict[str, str]) -> None:
    """Write a task like the original that reads local files."""
    config = {"include": str(original), "task": f"local_{name}", "dataset_path": "json", "dataset_name": None}
    text = yaml.safe_dump({**config, "tag": [], "dataset_kwargs": {"data_files": files}})
    (folder / f"{name}.yaml").write_text(text)


def main() -> None:
    """Score each task both ways, print a table and, last, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--quantize", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--task", action="append", choices=list(FILES))
    given = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from qcft.events import Watch
    from qcft.measure.catalog import Catalog
    from qcft.measure.suites import Scorer, TaskOptions
    from qcft.models.load import load_model, load_tokenizer
    from qcft.models.sources import resolve, weights_folder
    from qcft.models.switch import Switched
    from qcft.recipe import Evaluate, Model

    tasks = given.task or list(FILES)
    model = Model(name=MODEL, quantize=given.quantize)
    weights = weights_folder(resolve(model), Watch())
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    plain = AutoModelForCausalLM.from_pretrained(
        weights, dtype=torch.bfloat16, quantization_config=nf4 if given.quantize == "nf4" else None
    )
    wanted, seconds = {}, {}
    for task in tasks:
        begun = time.monotonic()
        wanted[task] = by_hand(task, given.data, given.limit, plain, weights)
        seconds[task] = time.monotonic() - begun
    del plain
    evaluate = Evaluate(tasks=tasks, local={task: str(given.data / FILES[task]) for task in tasks})
    catalog = Catalog(evaluate, Watch())
    scorer = Scorer(Switched(load_model(weights, model)).model, load_tokenizer(weights, model), BATCH, Watch())
    figures: dict[str, Any] = {}
    for task in tasks:
        begun = time.monotonic()
        found = scorer.score(task, catalog.load(task), TaskOptions(given.limit), task)
        took = time.monotonic() - begun
        # By hand, a group's mean over its tasks' items is summed in another order.
        equal = found.scores.keys() == wanted[task].keys() and all(
            math.isclose(value, wanted[task][key], rel_tol=0, abs_tol=1e-12) for key, value in found.scores.items()
        )
        print(f"{task}, {len(found.items)} items: by hand in {seconds[task]:.0f} s, qcft in {took:.0f} s")
        for key, value in found.scores.items():
            print(f"    {key:12} {wanted[task][key]:.17f} {value:.17f}", flush=True)
        figures[task] = {"value": equal, "unit": "equal", "goal": True, "met": equal}
    print(json.dumps({"benchmark": "by_hand", "figures": figures, "machine": platform.platform()}))


if __name__ == "__main__":
    main()
