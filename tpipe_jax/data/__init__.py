"""Turns text and token files into batches."""
