"""The mesh, number formats, and helpers for code that runs on one device: collectives,
conditionals, in-place buffers.
"""
