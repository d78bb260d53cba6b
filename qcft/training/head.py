"""The head in training: it scores only the tokens that bear loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from qcft.data.encode import IGNORED
from qcft.errors import QcftError
from qcft.private import in_order, of, private
from qcft.training.distributed.ranks import sharded

if TYPE_CHECKING:
    import torch


KERNEL = "trl.kernels:ChunkedLogProbFunction"
HEAD_WORDS = 32768  # of the vocabulary, whose logits TRL's fused head has in memory at a time


class AnswerTokens:
    """Makes TRL's head score only the tokens that bear loss; without Triton it would score every token."""

    def __init__(self, model: Any) -> None:
        self.chosen: Any = None
        self._hook = model.base_model.register_forward_hook(self._keep_chosen)

    def choose(self, inputs: dict[str, Any]) -> None:
        """Replace a batch's labels by those that bear loss, each at the position of the token before it."""
        labels = inputs.pop("labels")[:, 1:]
        self.chosen = labels != IGNORED
        inputs["shift_labels"] = labels[self.chosen][None]

    def remove(self) -> None:
        """Restore the model."""
        self._hook.remove()

    def _keep_chosen(self, module: Any, arguments: Any, output: Any) -> None:
        if self.chosen is not None:
            states = of(output, "transformers:BaseModelOutput.last_hidden_state")
            output.last_hidden_state = states[:, :-1][self.chosen][None]


class OwnHead:
    """The model's own code from last hidden states to logits, with its scaling and capping, after a pass whose layers
    returned `output`. The layers do not run. Raises QcftError if the head does not use the output of its layers."""

    def __init__(self, model: Any, output: Any) -> None:
        self.model = model
        self.output = output
        self.head = model.get_output_embeddings()
        self.whole = _gathered(self.head) if sharded() else self.head

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (tokens, vocabulary) of last hidden states (tokens, hidden size)."""
        import torch
        from torch import nn

        given = copy.copy(self.output)
        given.last_hidden_state = states[None]
        name, layers = self.model.base_model_prefix, self.model.base_model
        asked: list[bool] = []

        class StatesAlone(nn.Module):
            def forward(self, *_: Any, **__: Any) -> Any:
                asked.append(True)
                return given

            def __getattr__(self, name: str) -> Any:  # such as a factor that a family's head reads from its layers
                return getattr(layers, name)

        ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
        setattr(self.model, name, StatesAlone())
        self.model.set_output_embeddings(self.whole)
        try:
            logits: torch.Tensor = self.model.forward(input_ids=ids, use_cache=False).logits[0]
        finally:
            setattr(self.model, name, layers)
            self.model.set_output_embeddings(self.head)
        if not asked:
            raise no_head(self.model)
        return logits


def _gathered(head: Any) -> Any:
    """A head with sharded weights as a module with the whole weights, which does not communicate with other processes
    when it is called."""
    from torch import nn
    from torch.distributed.tensor import DTensor
    from torch.nn.functional import linear

    weight, bias = (w.full_tensor() if isinstance(w, DTensor) else w for w in (head.weight, head.bias))

    class Whole(nn.Module):
        def forward(self, states: torch.Tensor) -> torch.Tensor:
            return linear(states, weight, bias)

    return Whole()


def no_head(model: Any) -> QcftError:
    """The error for a family whose own code does not compute logits from the output of its layers."""
    family = model.config.get_text_config().model_type
    return QcftError(
        f"model: the logits of {family} cannot be computed apart from its layers",
        "remove the phase's anchor and replay.loss: distil",
    )


def first_word(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The summed log-probability of the vocabulary's first word after each state (tokens, hidden size), by TRL's fused
    head, with the same cost as a loss."""
    import torch

    head = private(KERNEL)
    given = {
        "hidden": states, "weight": weight, "bias": bias,
        "targets": torch.zeros(len(states), dtype=torch.long, device=states.device), "temperature": 1.0,
        "chunk_size": HEAD_WORDS, "final_logit_softcapping": None, "logit_scale": 1.0,
        "outputs": ("entropy", "is_top1"),
    }  # fmt: skip
    total: torch.Tensor = head.apply(*in_order(KERNEL, head.forward, given))[0].sum()
    return total


def own_loss(loss_type: str, smoothing: float) -> Callable[..., torch.Tensor]:
    """The loss of a pass from the model's own logits, for models where TRL's head would give a different one: `nll`,
    with labels smoothed by `smoothing`, or `dft`."""
    summed = summed_dft if loss_type == "dft" else partial(summed_nll, smoothing=smoothing)

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        total = summed(outputs.logits, labels)
        return total / ((labels[:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)

    return loss


def summed_nll(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """-sum ln p over the tokens that bear loss, in nats; logits (rows, tokens, vocabulary), labels (rows, tokens).
    `smoothing`: the share of each label that is spread over the vocabulary."""
    return _nll(logits, labels, "sum", smoothing)


def summed_dft(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """-sum p ln p, without a gradient for the factor p: DFT's loss (Wu et al. 2025, arXiv 2508.05629)."""
    each = _nll(logits, labels, "none")
    return (each * (-each).exp().detach()).sum()


def _nll(logits: torch.Tensor, labels: torch.Tensor, reduction: str, smoothing: float = 0.0) -> torch.Tensor:
    from torch.nn.functional import cross_entropy

    chosen = labels[:, 1:] != IGNORED
    given = logits[:, :-1][chosen].float(), labels[:, 1:][chosen]
    return cross_entropy(*given, reduction=reduction, label_smoothing=smoothing)
