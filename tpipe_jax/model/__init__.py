"""The transformer: its blocks, its parameters on a mesh, its floating-point operations."""
