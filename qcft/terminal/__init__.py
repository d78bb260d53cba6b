"""What a person sees in a terminal: progress, tables, the live view of an ablation."""
