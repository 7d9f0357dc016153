"""Trains a GPT through a token-sliced pipeline.

    python launch/multihost.py --config=configs/quickstart.py --config.train.num-steps=600

--help lists every setting.
"""

import sys

from tpipe_jax.flags import exit_status, parse


def main() -> None:
    flags = parse(sys.argv[1:], program="python launch/multihost.py")
    # Imported late, so that a mistake in the flags is answered at once.
    from tpipe_jax.console import Console
    from tpipe_jax.mesh import find_devices
    from tpipe_jax.train import train

    train(flags.config, flags.workdir, find_devices(flags.config.mesh), Console())


if __name__ == "__main__":
    sys.exit(exit_status(main))
