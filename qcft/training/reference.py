"""The terms of a phase's loss that keep it close to the model it started from, and that model's forward passes.

With y the target token, q the model that the phase started from, p the trained one, and N the answer tokens of an
optimizer step, the loss of the step is

    ( sum -ln p(y)  +  W * sum KL(q || p)  +  sum KL(q || p) ) / N
      new rows, and       new rows              replay rows, where
      replay rows that                          they are distilled
      are not distilled

with the anchor's weight W and, for a target-masked anchor (arXiv 2605.29498; direction and weight are ours), q and p
without y, renormalised over all other tokens. Distilled replay rows and an anchor of kind kl (arXiv 2512.22337) use the
whole vocabulary.

q needs no second model: it is the same one with the phase's adapter off, run without gradients and dropout on the same
pass, with the same kernels. The output of the frozen lowest layers is computed once per pass, if a model can be split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qcft.data.encode import IGNORED, EncodedRow
from qcft.models.adapters import AsBegun
from qcft.models.load import evaluating
from qcft.private import of
from qcft.recipe import Anchor, Phase
from qcft.training.distributed.ranks import sharded
from qcft.training.divergence import divergence
from qcft.training.head import OwnHead, no_head
from qcft.training.prefix import begun_at, caught_below

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

    from qcft.store.metrics import LossTerms

STATES = "transformers:BaseModelOutput.last_hidden_state"


@dataclass(frozen=True)
class Terms:
    """The terms of a phase's loss besides cross-entropy: an `anchor` on new rows; distilled replay rows."""

    anchor: Anchor | None = None
    distil: bool = False

    def __bool__(self) -> bool:
        return self.anchor is not None or self.distil

    def __str__(self) -> str:
        parts = [f"anchor {self.anchor}"] if self.anchor else []
        return ", ".join(parts + (["replay distilled"] if self.distil else []))


NO_TERMS = Terms()


def terms_of(phase: Phase) -> Terms:
    """The terms of a phase, from its recipe."""
    return Terms(phase.anchor, phase.replay is not None and phase.replay.loss == "distil")


LOGGED = ("loss", "new_loss", "anchor_kl", "distil_kl")  # each a mean over its own answer tokens, in nats


def terms_in_words(terms: LossTerms) -> str:
    """The values of the terms of a training's loss, as text."""
    found = {
        "new rows": terms["new_loss"],
        "anchor KL": terms["anchor_kl"],
        "distilled replay KL": terms["distil_kl"],
    }
    return ", ".join(f"{word} {value:.3f}" for word, value in found.items() if value is not None)


class Reference:
    """The model that a phase started from, inside the trained model, and the phase's loss terms.

    `shared`: the number of lowest layers that run once for both. To be created before AnswerTokens, whose hook reduces
    the states.
    """

    def __init__(self, model: PeftModel, terms: Terms, shared: int) -> None:
        import torch

        self.model = model
        self.terms = terms
        self.shared = shared
        self.base: Any = model.get_base_model()
        self.begun = AsBegun(model)
        self.sums = torch.zeros(len(LOGGED), 2, dtype=torch.float64)  # of each logged value: nats, answer tokens
        self._on_output: Callable[[Any], None] | None = None  # is called with the output of the layers in a pass
        self.base.base_model.register_forward_hook(self._hook)

    def loss(
        self, inputs: dict[str, Any], rows: Sequence[EncodedRow], plain: Callable[[], torch.Tensor], share: torch.Tensor
    ) -> torch.Tensor:
        """The loss of a pass with its terms. `inputs`: the pass, from whose labels distilled tokens are removed;
        `plain`: runs a forward pass and returns its cross-entropy; `share`: the weight of a summed nat in the loss."""
        import torch

        self._on_output = None  # may be left from a pass that did not fit into memory
        labels = inputs["labels"][:, 1:]  # at the position of the token before
        answers = labels != IGNORED
        replay = answers.masked_scatter(answers, _of_replay(rows).to(labels.device))
        new = answers & ~replay
        bears = (new if self.terms.anchor else torch.zeros_like(new)) | (replay if self.terms.distil else False)
        targets, by_anchor = labels[bears], new[bears]
        if self.terms.distil:
            labels.masked_fill_(replay, IGNORED)
        kl = nll = torch.zeros(len(targets), device=labels.device)
        if len(targets) or sharded():  # with sharded weights, all processes run the same passes
            states, boundary = self._reference(inputs, bears)
            with begun_at(self.base, self.shared, boundary) if boundary is not None else nullcontext():
                total, kl, nll = self._student(plain, states, bears, targets, by_anchor)
        else:
            total = plain()
        crossed = total.detach() / share
        self._count(
            (crossed, labels != IGNORED),
            (nll[by_anchor].sum() if self.terms.anchor else crossed, new),
            (kl[by_anchor].sum(), new),
            (kl[~by_anchor].sum(), replay),
        )
        return total + (kl * self._weights(by_anchor)).sum() * share if kl.requires_grad else total

    def logged(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float]:
        """The mean values of the passes since the last call, over all processes by `reduce`; values that no token bears
        are omitted."""
        sums = reduce(self.sums).tolist()
        self.forget()
        bears = {"anchor_kl": self.terms.anchor is not None, "distil_kl": self.terms.distil}
        found = zip(LOGGED, sums, strict=True)
        return {name: nats / count for name, (nats, count) in found if count and bears.get(name, True)}

    def forget(self) -> None:
        """Reset the sums, as for a step that did not fit into memory and starts again."""
        self.sums.zero_()

    def _reference(self, inputs: dict[str, Any], bears: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The last hidden states, at tokens that bear a term, of the model that the phase started from; and the output
        of its lowest layers, if these are shared."""
        import torch

        found: list[torch.Tensor] = []

        def keep(output: Any) -> None:
            states = of(output, STATES)
            found.append(states[:, :-1][bears])
            output.last_hidden_state = states[:1, :1]  # almost no work for the head

        self._on_output = keep
        unscored = torch.full((1, 1), IGNORED, device=bears.device)
        given = {key: value for key, value in inputs.items() if key != "labels"}
        with self.begun.live(), evaluating(self.base, sharded()), caught_below(self.base, self.shared) as boundary:
            self.model(**given, shift_labels=unscored, use_cache=False, fused_lm_head=True)
        return found[0], boundary[0] if boundary else None

    def _student(
        self,
        plain: Callable[[], torch.Tensor],
        states: torch.Tensor,
        bears: torch.Tensor,
        targets: torch.Tensor,
        by_anchor: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The cross-entropy loss, and the divergence and NLL of each token that bears a term."""
        import torch

        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        masked = by_anchor & (self.terms.anchor is not None and self.terms.anchor.kind == "target-masked")
        vocabulary = len(self.base.get_output_embeddings().weight)

        def compare(output: Any) -> None:
            if found or not torch.is_grad_enabled():  # a second pass, for the token accuracy
                return
            own = of(output, STATES)[:, :-1][bears]
            if not self._weights(by_anchor).any():
                own = own.detach()
            found.append(divergence(OwnHead(self.base, output), own, states, targets, masked, vocabulary))

        self._on_output = compare
        total = plain()
        self._on_output = None
        if not found:
            raise no_head(self.base)
        return (total, *found[0])

    def _count(self, *found: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Add to the sums of the logged values: for each, the nats, and the mask of the tokens that bear them."""
        import torch

        self.sums[:, 0] += torch.stack([nats.detach().double() for nats, _ in found]).cpu()
        self.sums[:, 1] += torch.stack([mask.sum() for _, mask in found]).cpu()

    def _weights(self, by_anchor: torch.Tensor) -> torch.Tensor:
        import torch

        anchored = self.terms.anchor.strength if self.terms.anchor else 0.0
        return torch.where(by_anchor, anchored, 1.0)

    def _hook(self, module: Any, arguments: Any, output: Any) -> None:
        if self._on_output is not None:
            self._on_output(output)


def _of_replay(rows: Sequence[EncodedRow]) -> torch.Tensor:
    """For each answer token of a pass, row after row, whether it is in a replay row."""
    import torch

    counts = [sum(label != IGNORED for label in row.labels[1:]) for row in rows]
    return torch.tensor([row.replay for row in rows]).repeat_interleave(torch.tensor(counts))
