"""Continues a text with the model of a run. The same as `tpipe generate`."""

import sys

from tpipe_jax.cli.main import run

if __name__ == "__main__":
    sys.exit(run("generate", sys.argv[1:]))
