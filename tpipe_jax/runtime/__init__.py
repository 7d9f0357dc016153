"""Lets the processes of a run start, agree, fail and stop together."""
