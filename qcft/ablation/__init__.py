"""Ablations: the arms, in this process, in one that is supervised, or on a Ray cluster."""
