"""Layers: which modules of a model may carry adapters, and which of them a freeze spec leaves free."""

from qcft.layers.modules import adapted_modules, decoder_layers

__all__ = ["adapted_modules", "decoder_layers"]
