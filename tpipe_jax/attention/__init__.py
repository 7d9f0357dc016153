"""One token slice over its context; one module per backend."""
