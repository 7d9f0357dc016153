"""Draws the losses of one run or several. The same as `tpipe plot`."""

import sys

from tpipe_jax.cli.main import run

if __name__ == "__main__":
    sys.exit(run("plot", sys.argv[1:]))
