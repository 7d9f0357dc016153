"""Times slices on the devices, and plans from these times.

The flag `--profile`, which records steps for xprof, is in `reporting/`.
"""
