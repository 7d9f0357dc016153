"""Trains a GPT through a token-sliced pipeline, in as many processes as it is started in.

    python launch/multihost.py --config=configs/quickstart.py --config.train.num-steps=600

Several processes are started by Slurm, Open MPI or Kubernetes (docs/clusters.md), by hand with
--coordinator=HOST:PORT --num-processes=N --process-id=I, or on this machine with
--local-processes=N. --help lists every setting.
"""

import sys
from functools import partial
from typing import Any

from tpipe_jax.commands.launch import launch
from tpipe_jax.config.command_line import exit_status, parse
from tpipe_jax.config.flags import Flags


def main() -> int:
    flags = parse(sys.argv[1:], program="python launch/multihost.py")
    return launch(flags, partial(work, flags))


def work(flags: Flags, *args: Any) -> None:
    from tpipe_jax.commands.train import train
    from tpipe_jax.reporting.step_profile import parse_steps

    train(*args, profiled=parse_steps(flags.profile, flags.config.train))


if __name__ == "__main__":
    sys.exit(exit_status(main))
