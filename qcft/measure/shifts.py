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

FEWEST_TOKENS = 4  # for which the unbiased HSIC is defined
SUM_BYTES = 10**9  # limit for the sums of the layers measured in one pass over the text

States = Callable[[Sequence[int], Sequence[int]], "list[torch.Tensor]"]  # token ids, layers -> (tokens, width) each


@dataclass(frozen=True)
class Shift:
    """How far one layer's hidden states moved, from a model X to a model Y.

    mean_shift        ||mean Y - mean X|| / sqrt(tr cov X): in units of the spread of the states of X
    covariance_shift  ||cov Y - cov X||_F / ||cov X||_F
    cka               debiased linear CKA (Kornblith et al. 2019, arXiv 1905.00414; Nguyen et al. 2021, arXiv
                      2010.15327, eq. 2): HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y)) with the unbiased HSIC of Song et
                      al. 2012 (JMLR 13, eq. 5). 1 where Y is X rotated or scaled, 0 on average where the two are
                      independent, for any number of tokens; the biased estimate is far above 0 there
    """

    mean_shift: float
    covariance_shift: float
    cka: float


class Moments:
    """Running sums over tokens, in fp64, of the states of two models and of their products.

    A state u is stored as (u - o, |u - o|^2, 1), o being the mean of the first states, so that the products contain the
    sums, the squared norms and their products too, which the unbiased HSIC needs.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        import torch

        self.tokens = 0
        self.origins = torch.zeros(2, width, dtype=torch.float64, device=device)
        self.products = torch.zeros(3, width + 2, width + 2, dtype=torch.float64, device=device)  # X'X, Y'Y, Y'X

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the states (tokens, width) of both models for the same tokens."""
        import torch

        states = [one.to(self.products) for one in (x, y)]
        if not self.tokens and len(x):
            self.origins = torch.stack([one.mean(dim=0) for one in states])
        self.tokens += len(x)
        near = [one - origin for one, origin in zip(states, self.origins, strict=True)]
        x, y = (torch.cat([u, u.square().sum(dim=1, keepdim=True), torch.ones_like(u[:, :1])], dim=1) for u in near)
        for product, left, right in zip(self.products, (x, y, y), (x, y, x), strict=True):
            product.addmm_(left.T, right)

    def shift(self) -> Shift:
        """The shift from the sums. Raises QcftError for fewer than 4 tokens, and for states not finite or all equal."""
        import torch

        if self.tokens < FEWEST_TOKENS:
            raise QcftError(
                f"CKA needs {FEWEST_TOKENS} tokens, and the probe text has {self.tokens} after the first of each row",
                "give more text",
            )
        (cov_x, hsic_x), (cov_y, hsic_y), (_, hsic) = (_covariance_and_hsic(one) for one in self.products)
        norm_x, norm_y = float(torch.linalg.norm(cov_x)), float(torch.linalg.norm(cov_y))
        if not (norm_x * norm_y > 0 and hsic_x * hsic_y > 0):  # true for NaN too
            raise QcftError(
                "a model's hidden states on the probe text are not finite, or all equal", "check its training losses"
            )
        mean_x, mean_y = (
            origin + product[-1, :-2] / self.tokens
            for origin, product in zip(self.origins, self.products, strict=False)
        )
        return Shift(
            float(torch.linalg.norm(mean_y - mean_x)) / float(torch.trace(cov_x)) ** 0.5,
            float(torch.linalg.norm(cov_y - cov_x)) / norm_x,
            hsic / (hsic_x * hsic_y) ** 0.5,
        )


def _covariance_and_hsic(product: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The covariance (width, width) of two models' states, and the unbiased HSIC of their linear kernels.

    From the product of the states as `Moments` keeps them. With centred states u, v of n tokens, Song et al.'s eq. 5
    is (||sum u v'||_F^2 - n/(n-2) sum |u|^2 |v|^2 + sum |u|^2 sum |v|^2 / ((n-1)(n-2))) / (n (n-3)), as the
    centred kernels' rows sum to 0.
    """
    import torch

    n = float(product[-1, -1])
    mean_u, mean_v = product[:-2, -1] / n, product[-1, :-2] / n
    scatter = product[:-2, :-2] - n * torch.outer(mean_u, mean_v)
    # |u - mean|^2 is the product of (u, |u|^2, 1) and (-2 mean, 1, |mean|^2).
    to_u, to_v = (torch.cat([-2 * m, m.new_ones(1), m.square().sum()[None]]) for m in (mean_u, mean_v))
    squares_u, squares_v = to_u @ product[:, -1], product[-1] @ to_v
    total = scatter.square().sum() - n / (n - 2) * (to_u @ product @ to_v) + squares_u * squares_v / ((n - 1) * (n - 2))
    return scatter / n, float(total) / (n * (n - 3))


def layer_shifts(
    first: States, second: States, rows: Sequence[Sequence[int]], layers: int, width: int, watch: Watch, label: str
) -> list[Shift]:
    """The shift of each layer's output over the tokens of `rows` (token ids), row by row.

    The first token of each row is skipped: decoders use it as an attention sink, and its states have hundreds of times
    the norm of the others, so they would dominate the result. Layers are measured in groups whose sums fit into a
    gigabyte; the text is run once for each group.
    """
    together = max(1, SUM_BYTES // (3 * 8 * (width + 2) ** 2))
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
    """The output of each of `layers` for one row of token ids: (tokens, width). `path`: the path of the list of decoder
    layers in the model."""
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
    """The results of a `drift` step."""
    return cast("DriftFile", step.json("drift.json"))
