"""The kinds of step: what each does, from its parents' files to its own."""
