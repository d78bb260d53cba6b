"""Whether training computes the same loss as the model itself: for single rows, padded rows and packed rows.

In a family that was not tested, packed rows may see each other, positions may continue from one row to the next, or the
model may scale its logits, which a separate head does not. Two short rows show this before a model is first trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.cache import cached_folder
from qcft.data.encode import IGNORED, EncodedRow
from qcft.errors import QcftError, short
from qcft.events import Watch
from qcft.files import read_json, write_json
from qcft.models.adapter_config import PREFIX
from qcft.models.adapters import TOP, lora_layers
from qcft.models.load import compute_dtype, evaluating
from qcft.private import private
from qcft.store.steps import package_versions
from qcft.training.attention import NAME, attend_by_rows
from qcft.training.head import AnswerTokens

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 1  # raised when what is compared changes
TEXT = "Every morning the baker walks along the river to the old mill and asks the miller how much flour is left."
OTHER = "A small ship with nine sails left the harbour at noon, although the wind had turned and rain was near."
LONG, SHORT = 72, 41  # tokens of the two rows
CLOSE = 0.02  # nats, the mean over a row's tokens; rounding in 16 bits is about a thousandth
APART = 0.002  # nats, the change of any token if another row is packed before it; 0 if rows are independent

# Rows, packed or padded -> log probabilities of answers.
RunRows = Callable[[Sequence[EncodedRow], bool], "torch.Tensor"]


@dataclass(frozen=True)
class Agreement:
    """Whether training agrees with the model's own forward pass. `fused`: the loss from TRL's head; `padded`: padded
    rows; `packed`: packed rows, which are also independent of each other. `why`: what does not agree."""

    fused: bool
    padded: bool
    packed: bool
    why: str


def agreement(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, watch: Watch) -> Agreement:
    """Compare the losses of two rows in training with the model's own: once for each config, way of loading and version
    of the libraries, then from the cache. The model is not changed.

    Raises QcftError for a family that cannot be trained at all.
    """

    def make(folder: Path) -> None:
        write_json(folder / "agreement.json", asdict(compare(model, tokenizer)))

    return Agreement(**read_json(cached_folder(f"agreement/{_key(model)}", make, watch) / "agreement.json"))


def _key(model: PreTrainedModel, *more: str) -> str:
    """The cache key of a result: the model's config, how it is loaded, and the versions of the libraries."""
    config = {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"}
    seen = [FORMAT, config, type(model).__name__, str(model.device), str(compute_dtype()), package_versions(), *more]
    return hashlib.sha256(json.dumps(seen, sort_keys=True, default=str).encode()).hexdigest()[:20]


def check_live(
    adapted: PeftModel,
    modules: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    watch: Watch,
    peft: Mapping[str, Any] | None = None,
) -> None:
    """Run a row forward and backward, to check that exactly the adapters on `modules` that were run get gradients: once
    for each model, modules, `peft` (fields of LoraConfig) and version of the libraries.

    Raises QcftError, naming the family.
    """

    def make(folder: Path) -> None:
        _check_live(adapted, modules, tokenizer)
        write_json(folder / "live.json", {"modules": len(modules)})

    cached_folder(f"live/{_key(adapted.get_base_model(), *modules, *map(str, (peft or {}).items()))}", make, watch)


def _check_live(adapted: PeftModel, modules: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
    import torch

    ran: set[str] = set()
    layers = {name: layer for name, layer in lora_layers(adapted) if name in modules}
    hooks = [layer.register_forward_hook(lambda *_, name=name: ran.add(name)) for name, layer in layers.items()]
    device = adapted.get_base_model().device
    adapted.train()  # some CPUs repack 4-bit weights in evaluation mode, which cannot be undone
    ids = torch.tensor([_row(tokenizer, TEXT, SHORT).input_ids], device=device)
    try:
        with torch.random.fork_rng(), torch.autocast(device.type, compute_dtype()):
            logits = adapted(input_ids=ids, use_cache=False).logits[0, :-1].float()
            loss: Any = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
            loss.backward()
        learning = {name for name, one in adapted.named_parameters() if one.grad is not None and one.grad.any()}
    finally:
        for hook in hooks:
            hook.remove()
        adapted.zero_grad(set_to_none=True)
    live = {name for name in ran if f"{PREFIX}{name}.lora_B.{TOP}.weight" in learning}
    others = {name for name in learning if f".{TOP}." not in name}
    family = adapted.get_base_model().config.get_text_config().model_type
    if dead := sorted(ran - live):
        raise QcftError(
            f"model: {family}: {len(dead)} of {len(ran)} adapters get no gradient, such as that on {dead[0]}",
            "name other modules with lora.targets, and please report this",
        )
    if others:
        raise QcftError(f"model: {family}: {min(others)} would be trained but is not an adapter", "please report this")


def compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Agreement:
    """The comparison itself."""
    import torch

    first, second, other = (_row(tokenizer, *of) for of in ((TEXT, LONG), (OTHER, SHORT), (OTHER, LONG)))
    why: list[str] = []
    with evaluating(model), torch.autocast(model.device.type, compute_dtype()):
        own = [_own(model, row) for row in (first, second)]
        with _trained(model) as run:
            try:
                alone = [run([row], False) for row in (first, second)]
                together = run([first, second], False)
            except Exception as error:  # a family's own code may raise anything
                family = model.config.get_text_config().model_type
                raise QcftError(
                    f"model: {family} cannot be trained: {type(error).__name__}: {short(error)}", "use another model"
                ) from None
            fused = _close(torch.cat(alone), torch.cat(own), "TRL's head gives a different loss than the model", why)
            padded = _close(together, torch.cat(alone), "rows depend on the rows they are padded with", why)
            packed = _packed(model, run, (first, second, other), alone, why)
    return Agreement(fused, padded, packed, "; ".join(why))


def _packed(
    model: PreTrainedModel, run: RunRows, rows: Sequence[EncodedRow], alone: list[torch.Tensor], why: list[str]
) -> bool:
    """Whether the second row has the same loss after the first row, after another, and alone."""
    import torch

    first, second, other = rows
    attention = model.config._attn_implementation
    by_rows = attend_by_rows(model, LONG)
    try:
        behind_first, behind_other = (run([before, second], True) for before in (first, other))
    except Exception as error:  # as above; padded, the family can be trained
        why.append(f"rows cannot be packed ({short(error, 80)})")
        return False
    finally:
        if by_rows:
            model.set_attn_implementation(attention)
    start = len(alone[0])
    moved = float((behind_first[start:] - behind_other[start:]).abs().max())
    if moved > APART:
        why.append(f"packed rows see each other: a token moved by {moved:.2g} nats")
        return False
    return _close(behind_first, torch.cat(alone), "packed rows have a different loss than single rows", why)


def _close(found: torch.Tensor, wanted: torch.Tensor, what: str, why: list[str]) -> bool:
    off = float((found - wanted).abs().mean())
    if off <= CLOSE:
        return True
    why.append(f"{what}, by {off:.2g} nats per token")
    return False


@contextmanager
def _trained(model: PreTrainedModel) -> Iterator[RunRows]:
    """The model as TRL's trainer runs it, with its collator and its head."""
    forward = model.__dict__.get("forward")
    private("trl.trainer.utils:add_fused_lm_head")(model, outputs=("log_probs",))
    answers = AnswerTokens(model)

    def run(rows: Sequence[EncodedRow], packed: bool) -> torch.Tensor:
        collate = private("trl.trainer.sft_trainer:DataCollatorForLanguageModeling")(0, padding_free=packed)
        batch = collate([{"input_ids": row.input_ids, "labels": row.labels} for row in rows])
        inputs = {key: one.to(model.device) if hasattr(one, "to") else one for key, one in batch.items()}
        if packed and model.config._attn_implementation == NAME:
            inputs["row_lengths"] = tuple(len(row.input_ids) for row in rows)
        answers.choose(inputs)
        log_probs: torch.Tensor = model(**inputs, use_cache=False, fused_lm_head=True).log_probs
        return log_probs.flatten().float()

    try:
        yield run
    finally:
        answers.remove()
        if forward is None:
            del model.forward
        else:
            model.forward = forward


def _own(model: PreTrainedModel, row: EncodedRow) -> torch.Tensor:
    """Log probabilities of a row's answer tokens from the model's own forward pass."""
    import torch

    ids = torch.tensor([row.input_ids], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    found = torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    return found[torch.tensor(row.labels[1:], device=found.device) != IGNORED]


def _row(tokenizer: PreTrainedTokenizerBase, text: str, size: int) -> EncodedRow:
    """A row of `size` tokens; all except the first few are the answer."""
    words = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = (words * size)[:size]
    return EncodedRow(ids, [IGNORED] * (size // 4) + ids[size // 4 :])
