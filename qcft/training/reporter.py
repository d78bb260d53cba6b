"""What a training tells while it runs: progress, log.jsonl; and how it hears the wish to stop."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from qcft.errors import QcftError
from qcft.events import Progress, Watch
from qcft.files import write_text
from qcft.layers import decoder_layers
from qcft.models.load import peak_memory
from qcft.training.batches import Batches
from qcft.training.ranks import any_stops, rank


def reporter(batches: Batches, log: Path, watch: Watch, label: str, below: int) -> Any:
    """The callback that watches a training; `below` layers are frozen under the lowest adapter."""
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        """Tells progress after every step, keeps log.jsonl, and hears the wish to stop."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.begun, self.first = time.monotonic(), state.global_step
            if args.gradient_checkpointing:
                # TRL and, just before this, the Trainer ask for gradients of the embeddings' output, which walks
                # the backward pass through every frozen layer. Non-reentrant checkpointing does not need them.
                kwargs["model"].disable_input_require_grads()
                _checkpoint_from(kwargs["model"], below)
            if rank() == 0 and log.is_file():  # steps after the checkpoint are trained, and logged, again
                lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
                write_text(log, "".join(line for line in lines if _step_of(line) <= state.global_step))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if any_stops(watch.stop_code is not None):
                control.should_save = True
                control.should_training_stop = True

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
        ) -> None:
            if not logs or "loss" not in logs:
                return
            step, loss = state.global_step, logs["loss"]
            if not math.isfinite(loss):
                raise QcftError(f"the loss is {loss} at step {step}", "try a lower train.lr")
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
                "token_accuracy": logs.get("mean_token_accuracy"),
                "tokens": tokens,
                "tokens_per_second": round(rate, 1),
                f"peak_{kind}_bytes": peak,
            }
            with log.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry) + "\n")
            stats = {"loss": f"{loss:.3f}", "speed": f"{rate:,.0f} tokens/s", "peak": f"{peak / 2**30:.1f} GiB {kind}"}
            watch.tell(Progress(label, step, batches.steps, "steps", stats))

    return Reporter()


def _checkpoint_from(model: Any, below: int) -> None:
    """Recompute no layer under the lowest adapter: the backward pass ends above, so nothing of theirs is kept."""
    base = model.get_base_model()
    for layer in base.get_submodule(decoder_layers(base)[0])[:below]:
        layer.gradient_checkpointing = False


def _step_of(line: str) -> float:
    """The step a line of log.jsonl is about; a line cut short by a kill is after every step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
