"""Layers: which modules of a model may have adapters, and which of them a freeze spec leaves trainable."""

from qcft.layers.modules import (
    LinearModule,
    adapted_in,
    adapted_modules,
    decoder_layers,
    frozen_in_words,
    frozen_whole,
    layer_of,
    linear_modules,
    lowest_adapted,
    scales_by_layer,
)

__all__ = [
    "LinearModule",
    "adapted_in",
    "adapted_modules",
    "decoder_layers",
    "frozen_in_words",
    "frozen_whole",
    "layer_of",
    "linear_modules",
    "lowest_adapted",
    "scales_by_layer",
]
