"""Replay: pools, generated answers, and the drawing of rows to an exact share."""
