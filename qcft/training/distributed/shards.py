"""Training with weights that are sharded across processes (FSDP 2, as accelerate configures it).

Adapters and checkpoints are gathered and written whole, as by one process: tensors without pickles. Any number of
processes can resume from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcft.private import private
from qcft.training.distributed.ranks import rank

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

OPTIMIZER = "optimizer.pt"


def allow_on_cpu() -> None:
    """Make accelerate use FSDP on CPUs, where it ignores it silently; to call before a trainer is made."""
    from accelerate import DistributedType, PartialState

    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        private("accelerate:PartialState._shared_state")["distributed_type"] = DistributedType.MULTI_GPU


def keep_precision(trainer: Any) -> None:
    """Gather weights in their own dtypes, adapters in fp32; autocast converts what is computed in 16 bits."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()


def held(model: PeftModel) -> float:
    """The share of the model's stored weights that this process holds."""
    from torch.distributed.tensor import DTensor

    weights = list(model.parameters())
    own = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in weights)
    return float(own / sum(p.numel() for p in weights))


def whole(model: PeftModel) -> dict[str, torch.Tensor]:
    """The trained weights, gathered; every process must call this."""
    return {name: p.full_tensor().detach().cpu() for name, p in _trained(model)}


def load_weights(model: PeftModel, weights: dict[str, torch.Tensor]) -> None:
    """Load whole weights, by their names in the model, into the sharded trained ones."""
    import torch
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():
        for name, p in _trained(model):
            p.copy_(distribute_tensor(weights[name].to(p.device, p.dtype), p.device_mesh, p.placements))


def save_optimizer(trainer: Any, folder: Path) -> None:
    """Write the whole state of the optimizer; every process must call this, rank 0 writes."""
    import torch
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(trainer.model, trainer.optimizer.optimizer, options=options)
    if rank() == 0:
        torch.save(state, folder / OPTIMIZER)


def load_optimizer(trainer: Any, folder: Path) -> None:
    """Load and shard a whole optimizer state; one process alone writes it by parameter numbers, not names."""
    import torch
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    saved = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
    optimizer = trainer.optimizer.optimizer
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    own = (names[id(p)] for group in optimizer.param_groups for p in group["params"])
    named = dict(zip((key for group in saved["param_groups"] for key in group["params"]), own, strict=True))
    state: dict[str, Any] = {
        "state": {named[key]: value for key, value in saved["state"].items()},
        "param_groups": [{**g, "params": [named[key] for key in g["params"]]} for g in saved["param_groups"]],
    }
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(trainer.model, optimizer, state, options=options)


def _trained(model: PeftModel) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)
