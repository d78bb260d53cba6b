"""Teacher-forced scores: negative log-likelihood and accuracy of each row's answer tokens.

NLL = -sum_t ln p(y_t | x, y_<t) over the answer's tokens y after the prompt x, in nats: the loss that language models
are trained on (Bengio et al. 2003, "A Neural Probabilistic Language Model", JMLR 3, section 2).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qcft.data.encode import IGNORED, EncodedRow, EncodedSet
from qcft.data.mix import in_groups
from qcft.errors import QcftError
from qcft.events import Watch
from qcft.files import write_json
from qcft.models.halving import in_halves
from qcft.models.load import evaluating
from qcft.store.opened import DoneStep

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BATCH_TOKENS = 1024  # padding counted
FILE = "scores.json"


@dataclass(frozen=True)
class RowScore:
    """One row: the summed NLL of its answer tokens in nats, their number, the number that were top-1, and its key."""

    nll: float
    tokens: int
    correct: int
    key: str = ""


def write_scores(folder: Path, groups: Mapping[str, Sequence[RowScore]]) -> None:
    """Write the scores of each group's rows into a step's folder."""
    write_json(folder / FILE, {name: [{"key": s.key} | asdict(s) for s in rows] for name, rows in groups.items()})


def read_scores(step: DoneStep, folder: str = "") -> dict[str, list[RowScore]]:
    """The scores measured by a step, group by group; `folder`: of one of a dial's points."""
    found = step.json(f"{folder}/{FILE}" if folder else FILE)
    return {name: [RowScore(**score) for score in rows] for name, rows in found.items()}


def score_rows(model: PreTrainedModel, rows: Sequence[EncodedRow], watch: Watch, label: str) -> list[RowScore]:
    """Score each row's answer tokens, including the end-of-turn tokens; in the order of `rows`.

    Raises QcftError where an NLL is not finite.
    """
    scores: dict[int, RowScore] = {}
    limited = keeps_logits(model)
    longest_first = sorted(range(len(rows)), key=lambda i: (-len(rows[i].input_ids), i))
    with evaluating(model):
        for chosen in in_groups(longest_first, lambda i: len(rows[i].input_ids), BATCH_TOKENS, padded=True):
            what = f"while scoring a row of {len(rows[chosen[0]].input_ids)} tokens"
            scored = in_halves(lambda some: _score(model, some, limited), [rows[i] for i in chosen], what)
            for i, score in zip(chosen, scored, strict=True):
                scores[i] = score
                if not math.isfinite(score.nll):
                    raise QcftError(f"{label}: the NLL is {score.nll}", "the model's weights or its adapter are broken")
            watch.progress(label, len(scores), len(rows), "rows")
    return [scores[i] for i in range(len(rows))]


def score_set(model: PreTrainedModel, held: EncodedSet, watch: Watch, label: str) -> list[RowScore]:
    """The scores of held-out rows, each with its row's key, which translations of one row share."""
    scores = score_rows(model, held.encoded, watch, label)
    return [replace(score, key=row.key) for row, score in zip(held.rows, scores, strict=True)]


def _score(model: PreTrainedModel, rows: Sequence[EncodedRow], limited: bool) -> list[RowScore]:
    """Score one batch."""
    logits, targets = answer_logits(model, rows, limited)
    return [_row_score(logits[i], targets[i]) for i in range(len(rows))]


def answer_logits(
    model: PreTrainedModel, rows: Sequence[EncodedRow], limited: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets (rows x positions) of one batch, padded on the right, only at the positions of answers."""
    import torch

    width = max(len(row.input_ids) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        ids[i, :length] = torch.tensor(row.input_ids)
        labels[i, :length] = torch.tensor(row.labels)
        mask[i, :length] = 1
    targets = labels[:, 1:]
    used = (targets != IGNORED).any(dim=0).nonzero().flatten()
    first, last = int(used[0]), int(used[-1]) + 1
    targets = targets[:, first:last]
    options = {"logits_to_keep": torch.arange(first, last, device=model.device)} if limited else {}
    logits = model(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False, **options
    ).logits
    if not limited:
        logits = logits[:, first:last]
    return logits, targets


def _row_score(logits: torch.Tensor, targets: torch.Tensor) -> RowScore:
    import torch

    where = (targets != IGNORED).nonzero().flatten()
    chosen = logits[where.to(logits.device)].float()
    wanted = targets[where].to(logits.device)
    nll = torch.nn.functional.cross_entropy(chosen, wanted, reduction="sum")
    return RowScore(float(nll), len(where), int((chosen.argmax(dim=-1) == wanted).sum()))


def keeps_logits(model: PreTrainedModel) -> bool:
    """Whether a model can compute logits for chosen positions only."""
    return "logits_to_keep" in inspect.signature(_inner(model).forward).parameters


def _inner(model: PreTrainedModel) -> PreTrainedModel:
    """The causal LM inside a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
