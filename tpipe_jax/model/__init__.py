"""What a layer is, and the model families."""
