"""Activations recomputed in the backward pass, in the layers that it goes through."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcft.layers import decoder_layers

if TYPE_CHECKING:
    from peft import PeftModel


def recompute_activations(model: PeftModel, below: int) -> None:
    """Turn checkpointing on, in the non-reentrant way, for the layers from `below` up."""
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    only_above(model, below)


def only_above(model: PeftModel, below: int) -> None:
    """Recompute no layer under the lowest adapter: the backward pass ends above, so nothing of theirs is kept.

    Nor are gradients of the embeddings' output asked for, which TRL and the Trainer do, and which would walk the
    backward pass through every frozen layer; non-reentrant checkpointing does not need them.
    """
    base = model.get_base_model()
    model.disable_input_require_grads()
    for layer in base.get_submodule(decoder_layers(base)[0])[:below]:
        layer.gradient_checkpointing = False
