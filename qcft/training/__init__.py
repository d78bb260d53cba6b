"""Training: the only room that knows TRL. It reports by events and prints nothing."""
