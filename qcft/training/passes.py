"""How many tokens run through the model at once: as many as fit into memory, with the same gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.data.encode import EncodedRow
from qcft.data.mix import in_groups
from qcft.errors import QcftError
from qcft.events import Watch
from qcft.files import read_json, write_json
from qcft.models.halving import attempt
from qcft.models.load import device
from qcft.training.checkpointing import recompute_activations

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

FILE = "passes.json"  # beside the checkpoints: a resumed training starts with the limit that was found to fit


@dataclass(frozen=True)
class Fit:
    """How passes run: `limit`, the most tokens at once (None: as planned); whether to `recompute` activations."""

    limit: int | None
    recompute: bool


class Passes:
    """Divides passes into parts of at most `limit` tokens (None: as planned), and into smaller ones when memory
    runs out.

    The loss of an optimizer step is a sum over its answer tokens divided by their number, so any division of its rows
    gives the same gradient, up to rounding. When memory runs out, the step starts again with the same rows.
    """

    def __init__(self, fit: Fit, padded: bool, folder: Path, watch: Watch) -> None:
        stored = read_json(folder / FILE) or {}
        limits = [one for one in (fit.limit, stored.get("limit")) if one]
        self.limit = min(limits, default=None)
        self.recompute = fit.recompute or bool(stored.get("recompute"))
        self.padded = padded
        self._file = folder / FILE
        self._watch = watch
        self._step = -1
        self._rows: list[list[EncodedRow]] = []  # of the passes in this step so far
        self._random: Any = None  # the generators' state when the step began, for dropout
        if self.limit is not None:
            self._keep()

    def run(
        self,
        model: PeftModel,
        step: int,
        rows: list[EncodedRow],
        below: int,
        part: Callable[[Any], torch.Tensor],
        forget: Callable[[], None],
    ) -> torch.Tensor:
        """Run the next pass of an optimizer step, forward and backward, with `part(rows)`; returns its loss.

        `forget` resets what `part` counted, when the step starts again. Raises QcftError if not even one row fits.
        """
        if step != self._step:
            self._step, self._rows, self._random = step, [], _random_state()
        self._rows.append(rows)
        passes = [rows]
        while True:
            loss = attempt(partial(self._run, passes, part))
            if loss is not None:
                return loss
            model.zero_grad()
            forget()
            self._make_room(model, below)
            _set_random_state(self._random)
            passes = self._rows

    def _run(self, passes: Sequence[list[EncodedRow]], part: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """Run all `passes`; the loss of the last one."""
        import torch

        for one in passes:
            losses = [part(some) for some in self.parts(one)]
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def parts(self, rows: Sequence[EncodedRow]) -> list[list[EncodedRow]]:
        """The rows of a pass, in the parts that run at once."""
        return divided(rows, self.limit, self.padded)

    def _make_room(self, model: PeftModel, below: int) -> None:
        """Halve the tokens that run at once; if that is one row already, recompute activations."""
        parts = [part for rows in self._rows for part in self.parts(rows)]
        largest = max(_tokens(part, self.padded) for part in parts)
        if any(len(part) > 1 for part in parts):
            self.limit = max(1, largest // 2)
            how = f"passes of {largest} tokens are halved; the rows of a step stay the same"
        elif not self.recompute:
            self.recompute = True
            recompute_activations(model, below)
            how = "activations are recomputed from now on (gradient_checkpointing)"
        else:
            raise QcftError(
                f"memory ran out while training on one row of {largest} tokens",
                "try a smaller train.max_length, freeze lower layers (freeze: first:N), or a smaller model",
            )
        self._keep()
        self._watch.note(f"memory ran out at step {self._step + 1}: {how}; the step starts again", "warning")

    def _keep(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file, asdict(Fit(self.limit, self.recompute)))


def divided(rows: Sequence[EncodedRow], limit: int | None, padded: bool) -> list[list[EncodedRow]]:
    """Rows in their order, in parts of at most `limit` tokens or one row; `padded`: each counts as the longest."""
    return [*in_groups(rows, lambda row: len(row.input_ids), limit or math.inf, padded=padded)]


def _tokens(rows: Sequence[EncodedRow], padded: bool) -> int:
    lengths = [len(row.input_ids) for row in rows]
    return len(lengths) * max(lengths) if padded else sum(lengths)


def _random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    import torch

    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if device() == "cuda" else []


def _set_random_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    import torch

    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
