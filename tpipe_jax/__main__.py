"""`python -m tpipe_jax` is `tpipe`."""

import sys

from tpipe_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
