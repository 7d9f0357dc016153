"""Saves a run, and restores it on any mesh."""
