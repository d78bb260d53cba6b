"""Measuring: what a model knows on held-out rows, and how sure a difference is."""
