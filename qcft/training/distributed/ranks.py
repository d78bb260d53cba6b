"""Several processes that train one phase together, as `accelerate launch` begins them: on rows of their own, each with
the whole model or, with FSDP 2, with a part of its weights.

Rank 0 walks the plan, writes and speaks; the others only train with it, step by step, when it says so.
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
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def sharded() -> bool:
    """Whether the weights are dealt out to the processes while they train."""
    return world() > 1 and _configured("FSDP")


def join() -> None:
    """Meet the other processes. Raises InputError for ways to train together that qcft does not know."""
    known = "launch with --multi_gpu (each GPU holds the whole model, in 4 bits), or --use_fsdp --fsdp_version 2"
    if _configured("DEEPSPEED"):
        raise InputError("accelerate is configured for DeepSpeed, which qcft does not train with", known)
    if _configured("FSDP") and os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("accelerate is configured for FSDP 1, which qcft does not train with", known)
    from accelerate import PartialState

    from qcft.models.load import device

    PartialState(cpu=device() == "cpu", timeout=PATIENCE)


def leave() -> None:
    """Part from the other processes, as this one is about to end: threads of a process group that are still there when
    the interpreter goes abort it now and then."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _configured(name: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def tell(message: str | None) -> None:
    """From rank 0 to all: the step to train next, or None at the end."""
    from torch import distributed

    distributed.broadcast_object_list([message], src=0)


def hear() -> str | None:
    """What rank 0 tells."""
    from torch import distributed

    heard: list[Any] = [None]
    distributed.broadcast_object_list(heard, src=0)
    return cast("str | None", heard[0])


def any_stops(stops: bool) -> bool:
    """Whether a process wants to stop; all ask at the same place."""
    if world() == 1:
        return stops
    import torch
    from accelerate import PartialState
    from torch import distributed

    flag = torch.tensor(int(stops), device=PartialState().device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag.item())


def shared_out(batches: Batches, processes: int) -> Batches:
    """The same optimizer steps with their passes dealt out to `processes`, pass by pass in turn.

    A step whose passes do not come out even is filled up with the shortest row, none of its tokens bearing loss, so
    that steps, their rows and their loss are those of one process.
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
