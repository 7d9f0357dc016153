"""Measures the loss of a run's model on data. The same as `tpipe evaluate`."""

import sys

from tpipe_jax.cli.main import run

if __name__ == "__main__":
    sys.exit(run("evaluate", sys.argv[1:]))
