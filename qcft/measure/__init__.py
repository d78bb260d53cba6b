"""Measuring: how well a model does on held-out rows and tasks, and how certain a difference is."""
