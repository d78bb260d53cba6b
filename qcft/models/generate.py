"""Answers to prompts, in batches sorted by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcft.events import Watch
from qcft.models.load import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 is greedy."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """An answer's text, its tokens without the end of turn, and whether it came to its end."""

    text: str
    tokens: int
    finished: bool


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    end_ids: list[int],
    sampling: Sampling,
    batch: int,
    watch: Watch,
    label: str | None = None,
) -> list[Answer]:
    """Answer each prompt (token ids), in the order of the prompts; tells progress when given a `label`."""
    import torch

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0]
    made = 0
    with evaluating(model):
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            width = max(len(prompts[i]) for i in chosen)
            ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in chosen])
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
            torch.manual_seed(sampling.seed + start)
            options = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=sampling.max_new_tokens,
                do_sample=sampling.temperature > 0,
                eos_token_id=end_ids,
                pad_token_id=pad,
                **(options if sampling.temperature > 0 else {}),
            )
            for i, sequence in zip(chosen, output[:, width:].tolist(), strict=True):
                answers[i] = _answer(tokenizer, sequence, end_ids)
                made += answers[i].tokens
            if label is None:
                watch.check_stop()
            else:
                watch.progress(label, start + len(chosen), len(order), "answers", tokens=f"{made:,} tokens")
    return [answers[i] for i in range(len(prompts))]


def _answer(tokenizer: PreTrainedTokenizerBase, sequence: list[int], end_ids: list[int]) -> Answer:
    end = next((i for i, token in enumerate(sequence) if token in end_ids), None)
    kept = sequence if end is None else sequence[:end]
    text = str(tokenizer.decode(kept, skip_special_tokens=True))
    return Answer(text.strip(), len(kept), end is not None)
