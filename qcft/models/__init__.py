"""Models: where weights come from, 4-bit loading, adapters, merging, generation."""
