"""The mesh, number formats, and the parts from which code of one device is built: collectives,
conditionals, in-place buffers.
"""
