"""Exchanges weights with Hugging Face's GPT-2. The same as `tpipe convert`."""

import sys

from tpipe_jax.cli.main import run

if __name__ == "__main__":
    sys.exit(run("convert", sys.argv[1:]))
