"""What a recipe needs, and whether this machine can run it."""
