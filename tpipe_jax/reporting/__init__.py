"""Console, metrics, pictures and traces of a run."""
