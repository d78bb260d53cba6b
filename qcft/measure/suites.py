"""Scoring a model on lm-eval's tasks, with lm-eval's own code from prompt to score, item by item."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import lm_eval.api.task
import numpy as np
from lm_eval import evaluator
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import set_torch_seed
from tqdm import tqdm

from qcft.data.render import TemplateRefused, render
from qcft.errors import QcftError
from qcft.events import Watch
from qcft.measure.clusters import CONTEXT, PARALLEL
from qcft.models.halving import attempt
from qcft.models.load import device

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# lm-eval's progress bars for building requests cannot be turned off, and would mix with qcft's.
lm_eval.api.task.tqdm = partial(tqdm, disable=True)

LARGEST = {"cuda": 64, "cpu": 16}  # items scored at once, unless memory sets a lower limit
TEXTS = 64  # items whose text is used to identify a task's language
# The main score of tasks that have several; by default the first one that the task lists.
MAIN = {"hellaswag": "acc_norm", "mlqa": "f1", "xquad": "f1", "ifeval": "prompt_level_strict_acc"}


@dataclass(frozen=True)
class TaskOptions:
    """The limits on items, shots and new tokens of a task; None: lm-eval's own."""

    limit: int | None = None
    shots: int | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Scored:
    """A task's scores by name, those of its parts, and which one is the main score; whether that is a mean over
    `items`, which have its value, the prompt and the answer; and the text of some items."""

    metric: str
    scores: Mapping[str, float]
    parts: Mapping[str, dict[str, float]]
    higher_is_better: bool
    shots: int
    generates: bool
    items: Sequence[Mapping[str, object]]
    is_mean: bool
    texts: Sequence[str]

    @property
    def prompts(self) -> str:
        """A digest of all prompts and documents, in order: equal where two models had the same prompts."""
        asked = (f"{item['prompt']} {item['doc']}" for item in self.items)
        return hashlib.sha256(" ".join(asked).encode()).hexdigest()


class Scorer:
    """A model wrapped as lm-eval's `hf`, with the chat template applied."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int | None, watch: Watch
    ) -> None:
        self.batch = batch or LARGEST[device()]
        self.lm = _Watched(model, tokenizer, self.batch, watch)

    def score(self, name: str, loaded: Mapping[str, Any], options: TaskOptions, label: str) -> Scored:
        """Score a task or group. A batch size that does not fit into memory is halved for good.

        Raises QcftError when not even one item fits, or the model's likelihoods are not finite.
        """
        self.lm.label = label
        while True:
            self.lm.batch_size_per_gpu = self.batch
            scored = attempt(lambda: _scored(name, _evaluate(self.lm, loaded, options), loaded))
            if scored is not None:
                return scored
            if self.batch == 1:
                raise QcftError("the memory ran out on a single item", "use a smaller model, or shorter items")
            self.batch //= 2


class _Watched(HFLM):
    """lm-eval's own model; the watch is notified of every answer."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int, watch: Watch) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch, enable_thinking=False)
        self.watch = watch
        self.label = ""
        self._done = self._total = 0
        self.set_cache_hook(self)  # it is called with every answer

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Called by lm-eval with every answer."""
        self._done += 1
        self.watch.progress(self.label, self._done, self._total, "requests")

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Raises QcftError where a likelihood is not finite."""
        self._begin(requests)
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        if not all(math.isfinite(value) for value, _ in found):
            raise QcftError("the model's likelihoods are not finite", "its training diverged: check its losses")
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        self._begin(requests)
        found: list[str] = super().generate_until(requests, disable_tqdm=True)
        return found

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The same as lm-eval's, within qcft's limits on rendering."""
        options = {"continue_final_message": not add_generation_prompt, **self.chat_template_args}
        try:
            return render(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt, **options)
        except TemplateRefused:
            others = [turn for turn in chat_history if turn["role"] != "system"]
            return render(self.tokenizer, others, add_generation_prompt=add_generation_prompt, **options)

    def _begin(self, requests: list[Instance]) -> None:
        self._done, self._total = 0, len(requests)
        self.watch.progress(self.label, 0, self._total, "requests")


def _evaluate(lm: HFLM, loaded: Mapping[str, Any], options: TaskOptions) -> Mapping[str, Any]:
    """The same as lm-eval's `simple_evaluate`, for a model and tasks that are loaded already."""
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    set_torch_seed(DEFAULT_OTHER_SEED)
    tasks = loaded["tasks"]
    for task in tasks.values():
        own = task.get_config("num_fewshot")
        if own != 0:  # a task with 0 always has 0
            task.set_config("num_fewshot", own or 0 if options.shots is None else options.shots)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        if options.max_new_tokens and task.OUTPUT_TYPE == "generate_until":
            most = (task.get_config("generation_kwargs") or {}).get("max_gen_toks", lm.max_gen_toks)
            task.set_config("generation_kwargs", {"max_gen_toks": min(most, options.max_new_tokens)}, update=True)
    found: Mapping[str, Any] = evaluator.evaluate(
        lm=lm,
        task_dict=loaded,
        limit=math.ceil(options.limit / len(tasks)) if options.limit else None,
        bootstrap_iters=0,  # qcft computes intervals over items, between stages
        apply_chat_template=True,
        fewshot_as_multiturn=True,
    )
    return found


def _scored(name: str, found: Mapping[str, Any], loaded: Mapping[str, Any]) -> Scored:
    tasks = loaded["tasks"]
    results = found["results"]
    scores = _numbers(results.get(name) or next(iter(results.values())))
    if not scores:
        raise QcftError(f"lm-eval has no score for {name}", "name the tasks of the group one by one in evaluate.tasks")
    plain = [key for key in scores if key == MAIN.get(name.split("_")[0])]
    metric = (plain or list(scores))[0]
    score, _, filtered = metric.partition(",")
    items = [
        {
            "task": task,
            "id": sample["doc_id"],
            "doc": sample["doc_hash"],
            "prompt": sample["prompt_hash"],
            "scores": {key: sample[key] for key in sample["metrics"]},
            **_kin(sample["doc"]),
            **({"answer": sample["resps"][0][0]} if tasks[task].OUTPUT_TYPE == "generate_until" else {}),
        }
        for task, samples in found["samples"].items()
        for sample in samples
        if sample["filter"] == (filtered or "none")
    ]
    values = [item["scores"].get(score) for item in items]
    numbers = [float(value) for value in values if isinstance(value, (bool, int, float, np.number))]
    is_mean = len(numbers) == len(items) and math.isclose(sum(numbers) / len(numbers), scores[metric], abs_tol=1e-9)
    return Scored(
        metric,
        scores,
        {task: {"items": found["n-samples"][task]["effective"], **_numbers(results[task])} for task in tasks},
        bool(next(iter(found["higher_is_better"].values())).get(score, True)),
        max(found["n-shot"].get(task, 0) for task in tasks),
        any("answer" in item for item in items),
        items,
        is_mean,
        _texts([sample["doc"] for samples in found["samples"].values() for sample in samples]),
    )


def _kin(doc: Mapping[str, Any]) -> dict[str, str]:
    """What an item shares with others if it is a question on a text: the text's digest, and the question's id."""
    if not isinstance(doc.get("context"), str):
        return {}
    text = hashlib.sha256(doc["context"].encode()).hexdigest()[:16]
    return {CONTEXT: text, **({PARALLEL: str(doc["id"])} if "id" in doc else {})}


def _texts(docs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The text of items, evenly spaced."""
    chosen = docs[:: math.ceil(len(docs) / TEXTS) or 1]
    return [" ".join(value for value in doc.values() if isinstance(value, str)) for doc in chosen]


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
    """Scores by name, followed by the filter's name if it is not `none`."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in results.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }
