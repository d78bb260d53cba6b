"""Running the plan of a recipe: done steps are reused, partial ones resumed, the others run."""
