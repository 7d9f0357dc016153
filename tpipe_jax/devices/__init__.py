"""The mesh, number formats, and what a program of one device is written in: collectives,
conditionals, in-place buffers.
"""
