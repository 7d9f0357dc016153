"""Text and token files to batches."""
