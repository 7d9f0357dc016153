"""Attention of one token slice over its context; one module per backend."""
