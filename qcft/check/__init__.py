"""What a recipe would take, and whether this machine can do it."""
