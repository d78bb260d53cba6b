"""How far one model's predictions are from another's on the same answers: mean KL and greedy agreement."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcft.data.encode import IGNORED, EncodedRow
from qcft.events import Watch
from qcft.measure.score import answer_logits, keeps_logits
from qcft.models.load import evaluating

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MOST_BYTES = 256 * 10**6  # of stored log-probabilities of the first model: its whole vocabulary, in fp32


@dataclass(frozen=True)
class Distance:
    """KL(first || second) in nats per answer token, and the share of answer tokens for which both models have the same
    most likely token; teacher-forced, on `compared_tokens`."""

    kl: float
    agreement: float
    compared_tokens: int


def predictions(model: PreTrainedModel, rows: Sequence[EncodedRow], watch: Watch, label: str) -> list[torch.Tensor]:
    """The log-probabilities of each row's answer tokens, fp32 on the CPU, for as many rows as fit in 256 MB."""
    kept: list[torch.Tensor] = []
    held = 0
    for logs in _each(model, rows, watch, label):
        held += logs.numel() * 4
        if kept and held > MOST_BYTES:
            break
        kept.append(logs)
    return kept


def compare(
    model: PreTrainedModel, rows: Sequence[EncodedRow], first: Sequence[torch.Tensor], watch: Watch, label: str
) -> Distance:
    """How far `model` is from the model whose `predictions` on the same rows are `first`."""
    kl, same, tokens = 0.0, 0, 0
    for before, after in zip(first, _each(model, rows[: len(first)], watch, label), strict=True):
        kl += float((before.exp() * (before - after)).sum())
        same += int((before.argmax(dim=-1) == after.argmax(dim=-1)).sum())
        tokens += len(before)
    return Distance(kl / tokens, same / tokens, tokens)


def _each(model: PreTrainedModel, rows: Sequence[EncodedRow], watch: Watch, label: str) -> Iterator[torch.Tensor]:
    """Row by row, so that both models see each row in the same shape."""
    import torch

    limited = keeps_logits(model)
    for done, row in enumerate(rows, start=1):
        with evaluating(model):
            logits, targets = answer_logits(model, [row], limited)
            where = (targets[0] != IGNORED).nonzero().flatten()
            logs = torch.log_softmax(logits[0][where.to(logits.device)].float(), dim=-1).cpu()
        yield logs
        watch.progress(label, done, len(rows), "rows")
