"""One step, and the loop over steps."""
