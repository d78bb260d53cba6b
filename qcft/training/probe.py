"""The live probe: English NLL on held-out rows while a phase trains, compared with the phase's starting model.

A probe is an additional forward pass: no gradients, no dropout, 4-bit modules stay in training mode. It does not change
the training. The steps of the probes are computed from token counts before training, so that a killed and resumed
training probes at the same steps, with the same decisions.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qcft.data.encode import IGNORED, EncodedRow
from qcft.data.mix import in_groups
from qcft.errors import QcftError
from qcft.events import Watch
from qcft.files import is_whole, write_text
from qcft.models.adapters import read_trained, save_trained
from qcft.models.halving import in_halves
from qcft.models.load import compute_dtype, evaluating
from qcft.recipe import Forgetting
from qcft.store.metrics import EnglishNll, LiveProbe
from qcft.training.batches import Batches
from qcft.training.checkpoints import newest_first, seal_newest, step_of
from qcft.words import counted

if TYPE_CHECKING:
    from peft import PeftModel

FILE = "english.jsonl"
COST = 0.05  # of the training's time at most, when qcft chooses
FEWEST_ROWS, FEWEST_PROBES = 4, 4
PASS_TOKENS = 512

SummedNll = Callable[[Sequence[EncodedRow]], float]  # over the answer tokens of rows that share a pass


class LoggedProbe(EnglishNll):
    """A line of english.jsonl."""

    seconds: float


@dataclass(frozen=True)
class Probing:
    """The rows to probe, the optimizer steps between probes, and the limits for a warning and for a stop."""

    rows: tuple[EncodedRow, ...]
    every: int
    warn: float | None
    stop: float | None

    @property
    def tokens(self) -> int:
        """Tokens of one probe."""
        return sum(len(row.input_ids) for row in self.rows)


def lay_out(settings: Forgetting, rows: Sequence[EncodedRow], batches: Batches, frozen: float) -> Probing | None:
    """Plan the probes of a training; None if even a few of them would cost over 5% of it, counted in tokens.

    A trained token costs a forward pass and, through the share of layers above the `frozen` ones, a backward pass of
    at least the same work; a probed token costs a forward pass. Within 5% by this count: all rows, as often as
    possible; fewer rows, but at least four, if that allows fewer than four probes (including start and end). A training
    with a `stop` limit gets at least four probes whatever they cost; `every` sets the steps between probes by hand.
    """
    chosen = tuple(rows[: settings.rows])
    if not chosen:
        return None
    if settings.every != "auto":
        return Probing(chosen, settings.every, settings.warn, settings.stop)
    budget = COST * batches.tokens_until(batches.steps) * (2 - frozen)
    while True:
        probes = math.floor(budget / sum(len(row.input_ids) for row in chosen))
        if probes >= FEWEST_PROBES:
            break
        if len(chosen) <= FEWEST_ROWS:
            if settings.stop is None:
                return None
            probes = FEWEST_PROBES
            break
        chosen = chosen[:-1]
    return Probing(chosen, math.ceil(batches.steps / (probes - 1)), settings.warn, settings.stop)


class EnglishProbe:
    """Probes one training, and stores the results in the step's english.jsonl.

    The rule of `stop`: training ends at the first probe where English NLL has risen by that share or more, and the
    adapter of the last probe before it is kept.
    """

    def __init__(
        self, probing: Probing, batches: Batches, folder: Path, watch: Watch, nll: SummedNll, together: bool
    ) -> None:
        self.probing = probing
        self.batches = batches
        self.folder = folder
        self.watch = watch
        self.nll = nll
        self.together = together
        self.found: list[LoggedProbe] = []
        self.stopped = False
        self.seconds = 0.0  # spent on probes by this process; `share`: of its training time
        self.share = 0.0
        self._begun = 0.0

    def begin(self, model: PeftModel, step: int) -> None:
        """Load the earlier probes until `step`, or measure the start if `step` is 0."""
        self._begun = time.monotonic()
        self.found = cast("list[LoggedProbe]", log_until(self.folder / FILE, step))
        for kept in newest_first(self.folder / "checkpoints", "kept"):
            if step_of(kept) > step:
                shutil.rmtree(kept)
        if not self.found:
            if step:
                raise QcftError(
                    f"{FILE} is missing, which holds the English NLL at the start of the phase",
                    f"remove the folder {str(self.folder)!r} to train the phase again",
                )
            self._measure(model, 0)

    def after(self, model: PeftModel, step: int) -> bool:
        """Probe if a probe is due at this step; whether training must stop here."""
        if step % self.probing.every and step != self.batches.steps:
            return False
        entry = self._measure(model, step)
        self.share = self.seconds / max(1e-9, time.monotonic() - self._begun)
        change, warn, stop = entry["change"], self.probing.warn, self.probing.stop
        self.stopped = stop is not None and change >= stop
        if warn is not None and change >= warn and all(one["change"] < warn for one in self.found[:-1]):
            where, rows = f"step {step} of {self.batches.steps}", counted(len(self.probing.rows), "row")
            self.watch.note(
                f"English NLL is {entry['nll']:.3f} at {where}, {change:+.0%} since the phase began ({rows}); "
                f"forgetting.warn is {warn:.0%}",
                "warning",
            )
        if stop is not None and not self.stopped:
            self._keep(model, step)
        return self.stopped

    def latest(self, step: int | None = None) -> LoggedProbe | None:
        """The last result; with `step`, only if it is from that step."""
        if not self.found or (step is not None and self.found[-1]["step"] != step):
            return None
        return self.found[-1]

    def go_back(self, model: PeftModel) -> int:
        """Replace the adapter by the kept one, from before the limit was passed; returns the step of that."""
        last = self.found[-1]
        kept = next(filter(is_whole, newest_first(self.folder / "checkpoints", "kept")), None)
        if kept is None:
            raise QcftError(
                f"English NLL rose by {last['change']:.0%} by step {last['step']}, the first probe: over "
                f"forgetting.stop ({self.probing.stop:.0%}), so nothing can be kept",
                "lower train.lr, freeze layers, add replay, or set forgetting.every to fewer steps",
            )
        read_trained(model, kept)
        step = step_of(kept)
        where = f"step {last['step']} of {self.batches.steps}"
        self.watch.note(
            f"stopped at {where}: English NLL {last['change']:+.0%} since the phase began, forgetting.stop is "
            f"{self.probing.stop:.0%}; the adapter of step {step} is kept",
            "warning",
        )
        return step

    def summary(self) -> LiveProbe:
        """The results of all probes. `share_of_time`: of the training's time, in the process that finished it."""
        return {
            "rows": len(self.probing.rows),
            "tokens": self.probing.tokens,
            "every": self.probing.every,
            "probes": [{"step": e["step"], "nll": e["nll"], "change": e["change"]} for e in self.found],
            "stopped_at": self.found[-1]["step"] if self.stopped else None,
            "share_of_time": round(self.share, 4),
        }

    def _measure(self, model: PeftModel, step: int) -> LoggedProbe:
        begun = time.monotonic()
        nll = english_nll(model, self.probing.rows, self.nll, self.together)
        if not math.isfinite(nll):
            raise QcftError(f"the English NLL is {nll} at step {step}", "try a lower train.lr")
        seconds = time.monotonic() - begun
        self.seconds += seconds
        start = self.found[0]["nll"] if self.found else nll
        entry: LoggedProbe = {"step": step, "nll": nll, "change": nll / start - 1, "seconds": round(seconds, 3)}
        self.found.append(entry)
        with (self.folder / FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")
        return entry

    def _keep(self, model: PeftModel, step: int) -> None:
        """Save the current adapter; the one before stays, in case this process is killed meanwhile."""
        folder = self.folder / "checkpoints" / f"kept-{step}"
        shutil.rmtree(folder, ignore_errors=True)
        save_trained(model, folder)
        seal_newest(folder)


def english_nll(model: PeftModel, rows: Sequence[EncodedRow], nll: SummedNll, together: bool) -> float:
    """Mean NLL per answer token of rows, in nats, with the kernels of training; `together`: rows may share a pass."""
    import torch

    total, tokens = 0.0, 0
    device: Any = model.device
    inner: Any = model
    with evaluating(inner), torch.autocast(device.type, compute_dtype(), enabled=compute_dtype() != torch.float32):
        for group in in_groups(rows, lambda row: len(row.input_ids), PASS_TOKENS if together else 1):
            total += sum(in_halves(lambda some: [nll(some)], group, "in the live probe"))
            tokens += sum(label != IGNORED for row in group for label in row.labels[1:])
    return total / tokens


def probe_callback(english: EnglishProbe) -> Any:
    """The callback that runs the probes of a training."""
    from transformers import TrainerCallback

    class Prober(TrainerCallback):
        """Probes when a probe is due, and stops the training if the probe says so."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            english.begin(kwargs["model"], state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if english.after(kwargs["model"], state.global_step):
                control.should_training_stop = True
                control.should_save = False  # a killed process must not resume from beyond the limit

    return Prober()


def log_until(file: Path, step: int) -> list[dict[str, Any]]:
    """The entries of a log up to a step. Later ones, and a line that a kill truncated, are removed, as the resumed
    training writes them again."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        with suppress(ValueError, KeyError, TypeError):
            entry = json.loads(line)
            if entry["step"] <= step:
                found.append(entry)
    write_text(file, "".join(json.dumps(entry) + "\n" for entry in found))
    return found
