"""Inspecting a run's models: their layers, how far apart two of them are, their answers."""
