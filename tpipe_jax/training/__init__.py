"""The training step, its optimiser and state, and the loop over steps."""
