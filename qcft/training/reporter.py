"""Reports from a running training: progress and log.jsonl; and stopping it on request."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qcft.data.encode import EncodedRow
from qcft.errors import QcftError
from qcft.events import Progress, Watch
from qcft.models.load import peak_memory
from qcft.training.batches import Batches
from qcft.training.checkpointing import only_above
from qcft.training.distributed.ranks import any_stops, rank
from qcft.training.probe import EnglishProbe, log_until
from qcft.training.reference import LOGGED

EXPLODED = 1e4  # the norm of the gradients; trainings that learn stay orders of magnitude below
TERMS = {"anchor_kl": "anchor", "distil_kl": "distil"}
NAMED = 4  # rows of each source in a message


def reporter(
    batches: Batches, log: Path, watch: Watch, label: str, below: int, english: EnglishProbe | None = None
) -> Any:
    """The callback that reports on a training; `below`: the number of frozen layers under the lowest adapter,
    `english`: the live probe."""
    from transformers import TrainerCallback

    class TrainingReporter(TrainerCallback):
        """Reports progress after every step, writes log.jsonl, and stops the training on request."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begun, self.first = time.monotonic(), state.global_step
            if args.gradient_checkpointing:
                only_above(kwargs["model"], below)  # TRL and, just before this, the Trainer change it
            if rank() == 0:
                log_until(log, state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if any_stops(watch.stop_code is not None):
                control.should_save = True
                control.should_training_stop = True

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
        ) -> None:
            if not logs or not {"loss", "objective"} & logs.keys():
                return
            step, loss = state.global_step, logs.get("loss")
            wrong = _diverged(logs.get("objective", logs.get("loss", 0.0)), logs.get("grad_norm"), skips=args.fp16)
            if wrong:  # raised before a checkpoint of this step is written: the last one is good
                raise QcftError(
                    f"{wrong} at step {step} of {batches.steps}, on {_named(batches.rows_of(step))}",
                    "check these rows, or lower train.lr; checkpoints from before this step are kept, and the same "
                    "command resumes from the last of them, with the same result",
                )
            if rank():
                return
            tokens = batches.tokens_until(step)
            rate = (tokens - batches.tokens_until(self.first)) / max(1e-9, time.monotonic() - self.begun)
            kind, peak = peak_memory()
            entry = {
                "step": step,
                "loss": loss,
                "lr": logs.get("learning_rate"),
                "grad_norm": logs.get("grad_norm"),
                # For a pass without cross-entropy (distilled replay), TRL reports an accuracy of 0.
                "token_accuracy": None if "distil_kl" in logs else logs.get("mean_token_accuracy"),
                "tokens": tokens,
                "tokens_per_second": round(rate, 1),
                f"peak_{kind}_bytes": peak,
            }
            if "objective" in logs:  # a loss with terms; those that no token of the step bears are null
                entry |= {name: logs.get(name) for name in ("objective", *LOGGED[1:])}
            if english and (here := english.latest(step)):
                entry |= {"english_nll": here["nll"], "english_change": here["change"]}
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
            shown = "none" if loss is None else f"{loss:.3f}"
            shown += "".join(f"  {word} {logs[name]:.3f}" for name, word in TERMS.items() if name in logs)
            stats = {"loss": shown, "speed": f"{rate:,.0f} tokens/s", "peak": f"{peak / 2**30:.1f} GiB {kind}"}
            if english and (last := english.latest()):
                stats["English"] = f"English NLL {last['nll']:.3f} ({last['change']:+.1%})"
            watch.emit(Progress(label, step, batches.steps, "steps", stats))

    return TrainingReporter()


def _diverged(loss: float, norm: float | None, skips: bool) -> str | None:
    """Why a training cannot continue, or None. `skips`: the fp16 scaler skips steps that overflow."""
    if not math.isfinite(loss):
        return f"the loss is {loss}"
    if norm is None or (skips and not math.isfinite(norm)):
        return None
    return f"the gradients explode: their norm is {norm:.3g}" if not norm <= EXPLODED else None


def _named(rows: Sequence[EncodedRow]) -> str:
    """The number of rows, and the names of the first ones by source."""
    by_source: dict[str, list[str]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row.name)
    parts = []
    for source, names in by_source.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        parts.append(f"{source}: {', '.join(repr(name) for name in names[:NAMED])}{more}")
    return f"{len(rows)} rows ({'; '.join(parts)})"
