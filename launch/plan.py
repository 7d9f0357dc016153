"""Plans the slices of a model, measured here or from a file. The same as `tpipe plan`."""

import sys

from tpipe_jax.cli.main import run

if __name__ == "__main__":
    sys.exit(run("plan", sys.argv[1:]))
