"""KL(q || p) per token, from last hidden states of a reference (q) and a student (p), without all logits at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

LOGITS = 1 << 24  # in memory at a time, for the student and the reference each
# Gradients of logits are between -1 and 1, most of them tiny: they are scaled by this power of two so that they do not
# underflow in fp16.
RAISED = 1 << 10

Head = Callable[["torch.Tensor"], "torch.Tensor"]  # states (tokens, hidden size) -> logits (tokens, vocabulary)


def divergence(
    head: Head,
    student: torch.Tensor,
    reference: torch.Tensor,
    targets: torch.Tensor,
    masked: torch.Tensor,
    vocabulary: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q || p) in nats at each token, and -ln p of its target over the whole vocabulary, without a gradient.

    `student`, `reference`: last hidden states (tokens, hidden size); only the student's get a gradient. Where `masked`
    (tokens), the divergence is that of q and p without the target, renormalised over all other tokens. Computed in
    fp32 from the output of `head`. The gradient by p's logits is p - q (for renormalised ones, 0 at the target). It is
    propagated through the head in the forward pass already, so that logits are not computed again.
    """
    at_once = max(1, LOGITS // vocabulary)
    found: tuple[torch.Tensor, torch.Tensor] = _function().apply(head, student, reference, targets, masked, at_once)
    return found


@cache
def _function() -> Any:
    import torch

    class Divergence(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            head: Head,
            student: torch.Tensor,
            reference: torch.Tensor,
            targets: torch.Tensor,
            masked: torch.Tensor,
            at_once: int,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            kl, nll = (torch.zeros(len(targets), device=student.device) for _ in range(2))
            wanted = ctx.needs_input_grad[1]
            gradient = torch.zeros(student.shape if wanted else 0, device=student.device)
            for start in range(0, len(targets), at_once):
                part = slice(start, start + at_once)
                given = student[part].detach().requires_grad_(wanted)
                with torch.set_grad_enabled(wanted):
                    logits = head(given)
                right, without = targets[part, None], masked[part, None]
                z = logits.detach().to(torch.float32, copy=True)
                nll[part] = z.logsumexp(-1) - z.gather(1, right)[:, 0]
                log_p = torch.log_softmax(_put(z, right, without, -math.inf), dim=-1)
                z = head(reference[part]).to(torch.float32, copy=True)
                log_q = torch.log_softmax(_put(z, right, without, -math.inf), dim=-1)
                q = log_q.exp()
                difference = _put(log_q.sub_(log_p), right, without, 0.0)  # where both are -inf, and q is 0
                kl[part] = difference.mul_(q).sum(-1)
                if wanted:
                    by_logits = log_p.exp_().sub_(q).mul_(RAISED).to(logits.dtype)
                    gradient[part] = torch.autograd.grad(logits, given, by_logits)[0].float() / RAISED
            ctx.save_for_backward(gradient)
            ctx.dtype = student.dtype
            ctx.mark_non_differentiable(nll)
            return kl, nll

        @staticmethod
        def backward(ctx: Any, by_kl: torch.Tensor, by_nll: Any) -> tuple[Any, ...]:
            (gradient,) = ctx.saved_tensors
            return None, (gradient * by_kl[:, None]).to(ctx.dtype), None, None, None, None

    return Divergence


def _put(numbers: torch.Tensor, right: torch.Tensor, where: torch.Tensor, value: float) -> torch.Tensor:
    """Write a value, in place, at the `right` tokens (tokens, 1) of the rows `where` it is requested."""
    return numbers.scatter_(1, right, numbers.gather(1, right).masked_fill(where, value))
