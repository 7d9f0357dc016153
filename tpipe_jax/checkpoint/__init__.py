"""Saves and restores on any mesh."""
