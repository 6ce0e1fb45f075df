"""Tasks: where rows come from, how an output is read, and what counts as right."""
