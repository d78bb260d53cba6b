"""Every recipe key with its values, its default and what it does: the table of recipes/README.md."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from qcft.recipe.freeze import FreezeSpec
from qcft.recipe.schema import MeasuredPhase, Recipe

MEANINGS = {
    "version": "of the recipe's format",
    "name": "names the run: letters, digits, `.`, `_`, `-`",
    "model.name": "a hub id, a folder, a `.gguf` file, or `smollm2-135m-instruct`, which qcft downloads (93 MB)",
    "model.revision": "a hub revision; it is pinned to its commit",
    "model.base": "the model it was tuned from, for `most-changed` and `least-changed` in the first phase",
    "model.quantize": "precision of the weights while training and measuring: 4 bits, or 16",
    "model.attn_implementation": "of transformers: `sdpa`, `flash_attention_2`",
    "model.trust_remote_code": "run code that comes with the model",
    "model.chat_template": "for models without a template",
    "model.special_tokens_in_text": "control tokens in the text of data: encoded as plain text, or as control tokens",
    "seed": "of adapters, order, sampling and random freezing",
    "deterministic": "train with deterministic kernels, which are slower on CUDA",
    "lora.r": "rank of the adapters",
    "lora.alpha": "LoRA's scale is alpha / r",
    "lora.dropout": "of the adapters' input",
    "lora.targets": "which modules get adapters: all linear ones, or the last parts of their names (`q_proj`)",
    "lora.rslora": "scale by alpha / sqrt(r)",
    "lora.peft.use_dora": "train a magnitude for each output beside the factors (DoRA)",
    "lora.peft.lora_bias": "train a bias beside factor B, where every adapted module has one",
    "lora.peft.init_lora_weights": "how factor A starts: PEFT's own way, or Gaussian",
    "lora.peft.rank_pattern": "ranks of modules by the end of their names: `{q_proj: 32}`",
    "lora.peft.alpha_pattern": "alphas of modules by the end of their names",
    "heldout.share": "share of each source's rows that is set aside for measuring",
    "heldout.rows": "rows scored of each language, at most",
    "heldout.data": "your own test sets, measured at every stage and never trained",
    "heldout.of": "measure the rows of these phases instead of the recipe's own; `qcft ablate` sets it",
    "answers.prompts": "held-out English prompts answered at every stage",
    "answers.max_new_tokens": "of an answer",
    "merge.warn_below": "warn where merging keeps less of what the phase learned",
    "merge.refuse_below": "stop where it keeps less; null: never",
    "merge.max_kl": "stop above this KL to the live adapter, nats per answer token",
    "merge.min_agreement": "stop below this share of equal greedy tokens",
    "merge.dtype": "of the merged weights; null: the base's",
    "forgetting": "the live probe of English while a phase trains; null: none",
    "forgetting.every": "optimizer steps between probes; auto: about 5% of the time at most",
    "forgetting.rows": "held-out English rows of a probe",
    "forgetting.warn": "warn at this relative rise of the NLL; null: never",
    "forgetting.stop": "stop training at this rise and keep the last adapter below it",
    "evaluate.suites": "suites of tasks",
    "evaluate.tasks": "other tasks of lm-eval",
    "evaluate.languages": "languages of the multilingual suite; null: the trained ones",
    "evaluate.stages": "which stages; null: the base, and each phase as the next one starts from it",
    "evaluate.limit": "items of each task",
    "evaluate.shots": "examples in a prompt; null: the task's own",
    "evaluate.max_new_tokens": "longest answer; null: the task's own",
    "evaluate.batch": "items at once",
    "evaluate.local": "files in place of a task's data on the hub: `{xquad_es: FILE}`",
    "evaluate.fidelity.prompts": "prompts of each language whose answers' language is checked",
    "evaluate.fidelity.max_new_tokens": "of such an answer",
    "probe": "other held-out texts to measure drift and merges on",
    "phases": "one or more, in order",
    "phases[].name": "used in `--set NAME.key=value` and as the stage's name",
    "phases[].data": "what the phase trains on; a path, a source, or a list of them",
    "phases[].adapter": "an adapter made elsewhere in place of data (first phase only)",
    "phases[].start": "what the phase starts from",
    "phases[].balance": "rows of each language: all; as many as the smallest has; `{temperature: T}`",
    "phases[].freeze": "which layers get no adapter",
    "phases[].replay": "a ratio, or the keys below; null: none",
    "phases[].anchor": "`target-masked`, `kl`, `kl:0.01`, or the keys below; null: none",
    "phases[].anchor.kind": "KL without the target token, or over the whole vocabulary",
    "phases[].anchor.weight": "null: 1.0 (target-masked), 0.01 (kl)",
    "phases[].system": "a system prompt for rows without one",
    "phases[].thinking": "for thinking models: train answers with their thoughts, without, or unmodified",
    "phases[].train.lr": "learning rate at its peak",
    "phases[].train.epochs": "passes over the mix; may be a fraction",
    "phases[].train.steps": "optimizer steps, in place of epochs",
    "phases[].train.batch": "rows per optimizer step; `auto`: 16, with `micro_batch: auto`",
    "phases[].train.micro_batch": "rows at once where not packed; auto: what memory holds",
    "phases[].train.max_length": "tokens of a row",
    "phases[].train.long_rows": "drop longer rows, or truncate them; raw text is always cut into pieces",
    "phases[].train.text.min_tokens": "of raw text: shorter documents, and last pieces of long ones, are dropped",
    "phases[].train.packing": "several rows in one sequence, without attention between them",
    "phases[].train.scheduler": "of the learning rate; any of transformers'",
    "phases[].train.warmup": "share of the steps",
    "phases[].train.optimizer": "auto: AdamW, on CUDA in 8 bits; any of transformers'",
    "phases[].train.gradient_checkpointing": "recompute activations; auto: where memory is short",
    "phases[].train.prefix_cache": "store the states that frozen lowest layers produce, and train from them",
    "phases[].train.checkpoint_steps": "between checkpoints; null: a tenth of the training, at most 50",
    "phases[].train.report_to": "`tensorboard`, `wandb`, `trackio`",
    "phases[].train.sft": "any other field of TRL's SFTConfig",
    "phases[].replay.ratio": "share of the final mix",
    "phases[].replay.unit": "of the ratio: rows, or answer tokens",
    "phases[].replay.kind": "where the rows come from (see Replay)",
    "phases[].replay.data": "English prompts or rows to use",
    "phases[].replay.path": "the file of `kind: file`",
    "phases[].replay.phase": "another earlier phase, in place of the first",
    "phases[].replay.parallel": "`english`: only rows parallel to the phase's, by id",
    "phases[].replay.mix": "several kinds, each with the keys of one and a `weight`",
    "phases[].replay.mix[].weight": "share among the kinds",
    "phases[].replay.on_shortfall": "with too few rows: stop, repeat them, or lower the ratio",
    "phases[].replay.stratify": "draw rows so that any part has the same lengths, or languages, as the whole",
    "phases[].replay.loss": "of replay rows: cross-entropy, or KL to the starting model",
    "phases[].replay.max_new_tokens": "of a generated answer",
    "phases[].replay.temperature": "of sampling; 0: greedy",
    "phases[].replay.top_p": "of sampling",
    "phases[].replay.chunk": "answers that are stored together",
    "phases[].replay.batch": "prompts answered at once",
    "phases[].replay.filters.unfinished": "drop answers that did not end within `max_new_tokens`",
    "phases[].replay.filters.duplicates": "drop repeated answers",
    "phases[].replay.filters.loops": "drop above this share of repeated five-word sequences; null: none",
    "phases[].replay.filters.language": "drop answers in another language; null: none",
    "phases[].replay.filters.refusals": "drop answers that begin by declining, in English",
    "data[].path": "a file, a folder, a hub id, or `qcft:NAME`; `{lang}` stands for a language",
    "data[].lang": "language code, or a list of them where the path has `{lang}`",
    "data[].take": "rows to train on: the first N, held-out rows not counted",
    "data[].format": "auto: detected from the columns; `text` is raw text",
    "data[].sample_by": "which part of a .txt file is one document; null: the whole file",
    "data[].columns": "the data's names of columns: `{instruction: question}`",
    "data[].revision": "of a data set on the hub",
    "data[].subset": "of a data set on the hub or a folder",
    "data[].split": "of a data set on the hub or a folder",
    "ablation.seeds": "null: the recipe's seed",
    "ablation.arms": "the variants",
    "ablation.arms[].name": "names the arm",
    "ablation.arms[].set": "keys to change, as `--set` does",
    "ablation.arms[].grid": "keys with lists of values: one arm for each combination",
    "ablation.arms[].mixed": "one phase trained on the data of all",
    "ablation.arms[].match": "what `mixed` is matched in; null: tokens",
    "ablation.grid": "a grid that crosses every arm",
    "ablation.gpus": "of a Ray task; null: one where the cluster has any",
    "ablation.cpus": "of a Ray task",
}
START, END = "<!-- keys: python -m qcft.recipe.keys -->", "<!-- /keys -->"
SHARED = {"Source": "data[]"}  # parts that stand at several places and are described once
NESTED_ELSEWHERE = {"ReplayPart": "phases[].replay"}  # their keys, but for those of their own, are described there


def keys() -> Iterator[tuple[str, str, str]]:
    """Every key as `phases[].train.lr`, with its values and its default as in YAML."""
    yield from _keys(Recipe, "")
    yield from _keys(_parts(MeasuredPhase.model_fields["data"].annotation)[0], "data[].")


def table() -> str:
    """The keys as a Markdown table. Raises KeyError for a key that is missing in MEANINGS."""
    rows = [f"| `{key}` | {values} | {default} | {MEANINGS[key]} |" for key, values, default in keys()]
    return "\n".join(["| key | values | default | what it does |", "|---|---|---|---|", *rows])


def with_table(text: str) -> str:
    """A Markdown text with the table between its two marks. Raises ValueError if the marks are missing."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"no {START} and {END}")
    return f"{before}{start}\n{table()}\n{end}{after}"


def _keys(part: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in part.model_fields.items():
        inner = [one for one in _parts(field.annotation) if one.__name__ not in SHARED]
        key = prefix + name
        if not inner or key in MEANINGS:
            yield key, _values(field.annotation), _default(field)
        for one in inner:
            if one is MeasuredPhase or one.__name__ == "Temperature":
                continue
            below = key + ("[]." if get_origin(_bare(field.annotation)) is list else ".")
            known = NESTED_ELSEWHERE.get(one.__name__)
            yield from (
                row for row in _keys(one, below) if known is None or row[0].replace(below, known + ".") not in MEANINGS
            )


def _bare(annotation: Any) -> Any:
    """An annotation without its validators, and without None."""
    if get_origin(annotation) is Annotated:
        return _bare(get_args(annotation)[0])
    if get_origin(annotation) in {Union, types.UnionType}:
        rest = [one for one in get_args(annotation) if one is not type(None)]
        if len(rest) == 1:
            return _bare(rest[0])
    return annotation


def _parts(annotation: Any) -> list[type[BaseModel]]:
    """The schema's parts that an annotation names."""
    bare = _bare(annotation)
    if isinstance(bare, type) and issubclass(bare, BaseModel):
        return [bare]
    if get_origin(bare) in {Union, types.UnionType, list}:
        return [part for one in get_args(bare) for part in _parts(one)]
    return []


def _values(annotation: Any) -> str:
    """The values of a key, in words or as a list."""
    bare = _bare(annotation)
    if get_origin(bare) in {Union, types.UnionType}:
        return ", ".join(dict.fromkeys(_values(one) for one in get_args(bare) if one is not type(None)))
    if get_origin(bare) is Literal:
        return ", ".join(f"`{str(one).lower()}`" for one in get_args(bare))
    if get_origin(bare) is list:
        return f"list of {_values(get_args(bare)[0])}"
    if _parts(bare):
        return "mapping"
    named = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text", FreezeSpec: "spec"}
    return named.get(bare, "mapping")


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    value = field.default
    if value is None or isinstance(value, bool):
        return f"`{str(value).lower() if value is not None else 'null'}`"
    if isinstance(value, BaseModel):
        return "as below"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value != "" else ""


if __name__ == "__main__":
    page = Path("recipes/README.md")
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
