"""Recomputing activations in the backward pass (gradient checkpointing), in the layers that it reaches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcft.layers import decoder_layers

if TYPE_CHECKING:
    from peft import PeftModel


def recompute_activations(model: PeftModel, below: int) -> None:
    """Turn on non-reentrant gradient checkpointing for layer `below` and all above it."""
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    only_above(model, below)


def only_above(model: PeftModel, below: int) -> None:
    """Recompute no layer under the lowest adapter: the backward pass ends above, so their activations are not kept.

    Also turn off gradients for the output of the embeddings, which TRL and the Trainer turn on: the backward pass would
    go through every frozen layer, and non-reentrant checkpointing does not need it.
    """
    base = model.get_base_model()
    model.disable_input_require_grads()
    for layer in base.get_submodule(decoder_layers(base)[0])[:below]:
        layer.gradient_checkpointing = False
