"""Layers: which modules of a model may carry adapters, and which of them a freeze spec leaves free."""

from qcft.layers.modules import (
    LinearModule,
    adapted_in,
    adapted_modules,
    decoder_layers,
    frozen_in_words,
    frozen_whole,
    linear_modules,
    lowest_adapted,
)

__all__ = [
    "LinearModule",
    "adapted_in",
    "adapted_modules",
    "decoder_layers",
    "frozen_in_words",
    "frozen_whole",
    "linear_modules",
    "lowest_adapted",
]
