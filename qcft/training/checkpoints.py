"""Complete checkpoints: sealed when they are written, checked when a training resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from qcft.events import Watch
from qcft.files import SEAL, is_whole, seal
from qcft.training.distributed.ranks import rank, world

KEPT = 2  # the last one, and the one before in case the last is altered


def sealing() -> Any:
    """The callback that seals each checkpoint once it is written, and removes old ones."""
    from transformers import TrainerCallback

    class Sealing(TrainerCallback):
        """Writes the list of a checkpoint's files and their digests, last of all."""

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if world() > 1:
                from accelerate import PartialState

                PartialState().wait_for_everyone()  # each process writes the state of its generators
            if rank():
                return
            seal_newest(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return Sealing()


def seal_newest(folder: Path) -> None:
    """Seal a folder `KIND-STEP`, and remove all except the last ones of its kind."""
    seal(folder)
    for old in newest_first(folder.parent, folder.name.split("-")[0])[KEPT:]:
        shutil.rmtree(old)


def newest_first(checkpoints: Path, kind: str = "checkpoint") -> list[Path]:
    """The folders of a kind, the latest step first."""
    return sorted(checkpoints.glob(f"{kind}-*"), key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """The step in a folder's name."""
    return int(folder.name.split("-")[1])


def last_whole(checkpoints: Path, watch: Watch) -> Path | None:
    """The newest complete checkpoint; incomplete ones are removed, with a warning unless the process was killed."""
    for checkpoint in newest_first(checkpoints):
        if is_whole(checkpoint):
            return checkpoint
        if (checkpoint / SEAL).exists():
            watch.note(f"{checkpoint.name} is altered; the training resumes from the one before it", "warning")
        if rank() == 0:
            shutil.rmtree(checkpoint)
    return None
