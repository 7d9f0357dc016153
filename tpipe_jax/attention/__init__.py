"""Attention of one token slice over its context, with one module per backend."""
