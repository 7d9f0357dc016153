"""Compiles a step for GPUs or TPUs that are not here. The same as `tpipe compile`."""

import sys

from tpipe_jax.cli.main import run

if __name__ == "__main__":
    sys.exit(run("compile", sys.argv[1:]))
