"""A recipe's files as rows, tokens, held-out groups and digests; the checks before any work."""
