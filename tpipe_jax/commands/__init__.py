"""Whole runs: train, plan, generate and evaluate, as the programs in `launch/` call them."""
