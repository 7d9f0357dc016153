"""Trains a GPT through a token-sliced pipeline, in as many processes as it is started in.

    python launch/multihost.py
    python launch/multihost.py --config=quickstart --config.train.num-steps=600
    python launch/multihost.py --workdir=runs/mine

Several processes are started by Slurm, Open MPI or Kubernetes (docs/clusters.md), by hand with
--coordinator=HOST:PORT --num-processes=N --process-id=I, or on this machine with
--local-processes=N. --help lists every setting. The same as `tpipe train`.
"""

import sys

from tpipe_jax.cli.main import run

if __name__ == "__main__":
    sys.exit(run("train", sys.argv[1:]))
