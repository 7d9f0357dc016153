"""Lists the checkpoints of a run, and whether each is as it was written.

    python launch/checkpoints.py runs/quickstart

Reads all of them and changes nothing, so it can be asked while the run goes on. The exit status is
1 if one is damaged.
"""

import sys
from pathlib import Path

import tyro

from tpipe_jax import checkpoint_files as files
from tpipe_jax.config import UserError
from tpipe_jax.flags import CheckpointsFlags, exit_status


def main() -> int:
    workdir = tyro.cli(CheckpointsFlags, prog="python launch/checkpoints.py").workdir
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{workdir} has no folder checkpoints: give the workdir of a run.")
    steps = files.list_steps(folder)
    print(f"{'step':>10} {'MB':>12}")
    results = [show(folder / str(step)) for step in reversed(steps)]
    for path in sorted(folder.iterdir()):
        if path.name not in map(str, steps):
            print(f"{path.name}: no checkpoint (docs/checkpoints.md)")
    return 0 if all(results) else 1


def show(checkpoint: Path) -> bool:
    """Prints a line; returns whether the checkpoint is sound."""
    try:
        files.check(checkpoint)
        state = "sound"
    except (files.DamagedError, OSError) as error:
        state = f"damaged: {error}"
    print(f"{checkpoint.name:>10} {files.num_bytes(checkpoint) / 1e6:12.1f}  {state}", flush=True)
    return state == "sound"


if __name__ == "__main__":
    sys.exit(exit_status(main))
