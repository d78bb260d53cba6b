"""A look at a run's models: their layers, and how far apart two of them are."""
