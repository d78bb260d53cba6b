"""The terms of a phase's loss that hold it to the model it started from, and that model's part in each pass.

With y the right token, q the model that the phase started from, p the one that trains, and N the answer tokens of an
optimizer step, its loss is

    ( sum -ln p(y)  +  W * sum KL(q || p)  +  sum KL(q || p) ) / N
      new rows, and       new rows              replay rows, where
      replay rows that                          they are distilled
      are not distilled

with the anchor's weight W and, for a target-masked anchor (arXiv 2605.29498; direction and weight are ours), q and p
without y, renormalised over all other tokens. Distilling replay rows and an anchor of kind kl (arXiv 2512.22337) take
the whole vocabulary.

q needs no second model: it is the same one with the phase's adapter off, run without gradients and dropout on the same
pass, by the same kernels. What the frozen lowest layers make of a pass is computed once, where a model can be split.
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
    """What a phase's loss has beside cross-entropy: an `anchor` on new rows; replay rows that are distilled."""

    anchor: Anchor | None = None
    distil: bool = False

    def __bool__(self) -> bool:
        return self.anchor is not None or self.distil

    def __str__(self) -> str:
        parts = [f"anchor {self.anchor}"] if self.anchor else []
        return ", ".join(parts + (["replay distilled"] if self.distil else []))


NO_TERMS = Terms()


def terms_of(phase: Phase) -> Terms:
    """The terms of a phase as its recipe has it."""
    return Terms(phase.anchor, phase.replay is not None and phase.replay.loss == "distil")


LOGGED = ("loss", "new_loss", "anchor_kl", "distil_kl")  # each a mean over its own answer tokens, in nats


def terms_in_words(terms: LossTerms) -> str:
    """What the terms of a training's loss came to."""
    found = {
        "new rows": terms["new_loss"],
        "anchor KL": terms["anchor_kl"],
        "distilled replay KL": terms["distil_kl"],
    }
    return ", ".join(f"{word} {value:.3f}" for word, value in found.items() if value is not None)


class Reference:
    """The model that a phase started from, in the model that trains, and what the phase's terms come to.

    `shared`: so many lowest layers are run once for both. To be made before AnswerTokens, whose hook cuts states down.
    """

    def __init__(self, model: PeftModel, terms: Terms, shared: int) -> None:
        import torch

        self.model = model
        self.terms = terms
        self.shared = shared
        self.base: Any = model.get_base_model()
        self.begun = AsBegun(model)
        self.sums = torch.zeros(len(LOGGED), 2, dtype=torch.float64)  # of each that is logged: nats, answer tokens
        self._hear: Callable[[Any], None] | None = None  # is given what the layers of the model come to in a pass
        self.base.base_model.register_forward_hook(self._heard)

    def loss(
        self, inputs: dict[str, Any], rows: Sequence[EncodedRow], plain: Callable[[], torch.Tensor], share: torch.Tensor
    ) -> torch.Tensor:
        """The loss of a pass with its terms. `inputs`: the pass, whose labels lose what is distilled; `plain`: its loss
        by cross-entropy, from a forward pass; `share`: what a summed nat counts in it."""
        import torch

        self._hear = None  # of a pass that did not fit into memory
        labels = inputs["labels"][:, 1:]  # in the place of the token before
        answers = labels != IGNORED
        replay = answers.masked_scatter(answers, _of_replay(rows).to(labels.device))
        new = answers & ~replay
        bears = (new if self.terms.anchor else torch.zeros_like(new)) | (replay if self.terms.distil else False)
        targets, by_anchor = labels[bears], new[bears]
        if self.terms.distil:
            labels.masked_fill_(replay, IGNORED)
        kl = nll = torch.zeros(len(targets), device=labels.device)
        if len(targets) or sharded():  # where weights are dealt out, processes run the same passes
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
        """What the passes since it was last asked came to, over all processes by `reduce`; without what no token
        bears."""
        sums = reduce(self.sums).tolist()
        self.forget()
        bears = {"anchor_kl": self.terms.anchor is not None, "distil_kl": self.terms.distil}
        found = zip(LOGGED, sums, strict=True)
        return {name: nats / count for name, (nats, count) in found if count and bears.get(name, True)}

    def forget(self) -> None:
        """Begin anew, as a step is that did not fit into memory."""
        self.sums.zero_()

    def _reference(self, inputs: dict[str, Any], bears: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The last hidden states of the model that the phase started from where tokens bear a term, and what its lowest
        layers came to where these are shared."""
        import torch

        found: list[torch.Tensor] = []

        def keep(output: Any) -> None:
            states = of(output, STATES)
            found.append(states[:, :-1][bears])
            output.last_hidden_state = states[:1, :1]  # the head has nothing to do

        self._hear = keep
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
        """The loss by cross-entropy, and the divergences and NLL of the tokens that bear a term."""
        import torch

        found: list[tuple[torch.Tensor, torch.Tensor]] = []
        masked = by_anchor & (self.terms.anchor is not None and self.terms.anchor.kind == "target-masked")
        vocabulary = len(self.base.get_output_embeddings().weight)

        def compare(output: Any) -> None:
            if found or not torch.is_grad_enabled():  # a second pass, for the share of tokens that are right
                return
            own = of(output, STATES)[:, :-1][bears]
            if not self._weights(by_anchor).any():
                own = own.detach()
            found.append(divergence(OwnHead(self.base, output), own, states, targets, masked, vocabulary))

        self._hear = compare
        total = plain()
        self._hear = None
        if not found:
            raise no_head(self.base)
        return (total, *found[0])

    def _count(self, *found: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Add to the sums of what is logged: of each, the nats, and the mask of the tokens that bear them."""
        import torch

        self.sums[:, 0] += torch.stack([nats.detach().double() for nats, _ in found]).cpu()
        self.sums[:, 1] += torch.stack([mask.sum() for _, mask in found]).cpu()

    def _weights(self, by_anchor: torch.Tensor) -> torch.Tensor:
        import torch

        anchored = self.terms.anchor.strength if self.terms.anchor else 0.0
        return torch.where(by_anchor, anchored, 1.0)

    def _heard(self, module: Any, arguments: Any, output: Any) -> None:
        if self._hear is not None:
            self._hear(output)


def _of_replay(rows: Sequence[EncodedRow]) -> torch.Tensor:
    """Of each answer token of a pass, row after row, whether it is one of replay."""
    import torch

    counts = [sum(label != IGNORED for label in row.labels[1:]) for row in rows]
    return torch.tensor([row.replay for row in rows]).repeat_interleave(torch.tensor(counts))
