"""Processes: start, agree, fail and stop together."""
