"""Lists the checkpoints of a run, and checks them. The same as `tpipe checkpoints`."""

import sys

from tpipe_jax.cli.main import run

if __name__ == "__main__":
    sys.exit(run("checkpoints", sys.argv[1:]))
