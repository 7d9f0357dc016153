"""Saves the training state, and restores it on any mesh."""
