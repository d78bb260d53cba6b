"""Walking the plan of a recipe: what is done is reused, what is partial resumed, the rest run."""
