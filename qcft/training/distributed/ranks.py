"""Several processes that train one phase together, as `accelerate launch` starts them: each on its own rows, with the
whole model or, with FSDP 2, with a shard of its weights.

Rank 0 runs the plan, writes files and prints; the others only train the steps that rank 0 broadcasts.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

from qcft.data.encode import IGNORED
from qcft.errors import InputError
from qcft.training.batches import FILLER, Batches

PATIENCE = timedelta(days=30)  # while rank 0 generates or measures, the others wait in a collective


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if world() > 1 else 0


def world() -> int:
    """The number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharded() -> bool:
    """Whether the weights are sharded across the processes in training."""
    return world() > 1 and _configured("FSDP")


def join() -> None:
    """Join the process group. Raises InputError for kinds of distributed training that qcft does not support."""
    known = "launch with --multi_gpu (each GPU holds the whole model, in 4 bits), or --use_fsdp --fsdp_version 2"
    if _configured("DEEPSPEED"):
        raise InputError("accelerate is configured for DeepSpeed, which qcft does not train with", known)
    if _configured("FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("accelerate is configured for FSDP 1, which qcft does not train with", known)
    from accelerate import PartialState

    from qcft.models.load import device

    PartialState(cpu=device() == "cpu", timeout=PATIENCE)


def leave() -> None:
    """Leave the process group before this process ends: threads of a group that are still alive when the interpreter
    exits sometimes abort it."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _configured(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def broadcast_step(message: str | None) -> None:
    """Broadcast from rank 0: the step to train next, or None at the end."""
    from torch import distributed

    distributed.broadcast_object_list([message], src=0)


def receive_step() -> str | None:
    """Receive the broadcast of rank 0."""
    from torch import distributed

    received: list[Any] = [None]
    distributed.broadcast_object_list(received, src=0)
    return cast("str | None", received[0])


def any_stops(stops: bool) -> bool:
    """Whether any process wants to stop; all processes must call this at the same point."""
    if world() == 1:
        return stops
    import torch
    from accelerate import PartialState
    from torch import distributed

    flag = torch.tensor(int(stops), device=PartialState().device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag.item())


def split_over(batches: Batches, processes: int) -> Batches:
    """The same optimizer steps with their passes distributed to `processes`, one pass after the other.

    A step with too few passes for all processes is filled up with the shortest row, without loss on its tokens, so that
    steps, their rows and their loss are the same as with one process.
    """
    if processes == 1:
        return batches
    shortest = min((row for item in batches.items for row in item), key=lambda row: len(row.input_ids))
    filler = [replace(shortest, labels=[IGNORED] * len(shortest.labels), source=FILLER)]
    per_step = batches.per_pass * batches.accumulation
    items = []
    for first in range(0, len(batches.items), per_step):
        step = batches.items[first : first + per_step]
        items += step + [filler] * (-len(step) % (batches.per_pass * processes))
    return replace(batches, items=items, accumulation=math.ceil(batches.accumulation / processes) * processes)
