"""Representation drift: how far hidden states move between two models on the same text, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from qcft.errors import QcftError
from qcft.events import Watch
from qcft.models.load import evaluating
from qcft.store.metrics import DriftFile
from qcft.store.opened import DoneStep

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SUM_BYTES = 10**9  # that the sums of the layers measured in one pass over the text may take

States = Callable[[Sequence[int], Sequence[int]], "list[torch.Tensor]"]  # token ids, layers -> (tokens, width) each


@dataclass(frozen=True)
class Shift:
    """How far one layer's hidden states moved, from a model X to a model Y.

    mean_shift        ||mean Y - mean X|| / sqrt(tr cov X): in units of the states' own spread in X
    covariance_shift  ||cov Y - cov X||_F / ||cov X||_F
    cka               linear CKA (Kornblith et al. 2019, arXiv 1905.00414, eq. 3 with linear kernels): for centred
                      states ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F); 1 where Y is X turned or scaled
    """

    mean_shift: float
    covariance_shift: float
    cka: float


class Moments:
    """Running sums over tokens, in fp64, of the states of two models and of their products."""

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        import torch

        self.tokens = 0
        self.sums = torch.zeros(2, width, dtype=torch.float64, device=device)
        self.products = torch.zeros(3, width, width, dtype=torch.float64, device=device)  # X'X, Y'Y, Y'X

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the states (tokens, width) that both models have for the same tokens."""
        import torch

        x, y = x.to(self.sums), y.to(self.sums)
        self.tokens += len(x)
        self.sums += torch.stack([x.sum(dim=0), y.sum(dim=0)])
        for product, left, right in zip(self.products, (x, y, y), (x, y, x), strict=True):
            product.addmm_(left.T, right)

    def shift(self) -> Shift:
        """What the sums come to. Raises QcftError where states are not finite, or all alike."""
        import torch

        means = self.sums / self.tokens
        mean_x, mean_y = means
        cov_x, cov_y, cross = (
            product / self.tokens - torch.outer(left, right)
            for product, left, right in zip(
                self.products, (mean_x, mean_y, mean_y), (mean_x, mean_y, mean_x), strict=True
            )
        )
        norm_x, norm_y = float(torch.linalg.norm(cov_x)), float(torch.linalg.norm(cov_y))
        if not norm_x * norm_y > 0:  # nan, too
            raise QcftError(
                "a model's hidden states on the probe text are not finite, or all alike", "look at its losses"
            )
        return Shift(
            float(torch.linalg.norm(mean_y - mean_x)) / float(torch.trace(cov_x)) ** 0.5,
            float(torch.linalg.norm(cov_y - cov_x)) / norm_x,
            float(torch.linalg.norm(cross)) ** 2 / (norm_x * norm_y),
        )


def layer_shifts(
    first: States, second: States, rows: Sequence[Sequence[int]], layers: int, width: int, watch: Watch, label: str
) -> list[Shift]:
    """The shift of each layer's output over the tokens of `rows` (token ids), row by row.

    The first token of a row is left out: decoders park attention there, in states of hundreds of times the norm of
    any others, which would be all that one saw. Layers are taken together as far as their sums fit into a gigabyte;
    the text is run once more for each such group.
    """
    together = max(1, SUM_BYTES // (3 * 8 * width**2))
    groups = [range(i, min(i + together, layers)) for i in range(0, layers, together)]
    found: list[Shift] = []
    done = 0
    for group in groups:
        sums: list[Moments] = []
        for row in rows:
            states = zip(first(row, group), second(row, group), strict=True)
            for number, (x, y) in enumerate(states):
                if number == len(sums):
                    sums.append(Moments(width, x.device))
                sums[number].add(x[1:], y[1:])
            done += 1
            watch.progress(label, done, len(rows) * len(groups), "rows")
        found += [one.shift() for one in sums]
    return found


def layer_outputs(model: PreTrainedModel, path: str, row: Sequence[int], layers: Sequence[int]) -> list[torch.Tensor]:
    """What each of `layers` hands to the next, for one row of token ids: (tokens, width). `path`: where the list of
    decoder layers lies in the model."""
    import torch

    caught: dict[int, torch.Tensor] = {}

    def catch(number: int) -> Any:
        def keep(module: Any, arguments: Any, output: Any) -> None:
            caught[number] = (output[0] if isinstance(output, tuple) else output)[0]

        return keep

    listed: Any = model.get_submodule(path)
    hooks = [listed[number].register_forward_hook(catch(number)) for number in layers]
    try:
        with evaluating(model):
            model(input_ids=torch.tensor([list(row)], device=model.device), use_cache=False, **_no_logits(model))
    finally:
        for hook in hooks:
            hook.remove()
    return [caught[number] for number in layers]


def _no_logits(model: PreTrainedModel) -> dict[str, int]:
    from qcft.measure.score import keeps_logits

    return {"logits_to_keep": 1} if keeps_logits(model) else {}


def read_drift(step: DoneStep) -> DriftFile:
    """What a `drift` step found."""
    return cast("DriftFile", step.json("drift.json"))
