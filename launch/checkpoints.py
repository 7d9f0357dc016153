"""Lists the checkpoints of a run, and whether each is as it was written.

    python launch/checkpoints.py runs/quickstart

Reads all of them and changes nothing, so it can be asked while the run goes on. The exit status is
1 if one is damaged.
"""

import sys
from pathlib import Path

import tyro

from tpipe_jax.checkpoint import manifest
from tpipe_jax.config.command_line import exit_status
from tpipe_jax.config.flags import CheckpointsFlags
from tpipe_jax.errors import UserError


def main() -> int:
    workdir = tyro.cli(CheckpointsFlags, prog="python launch/checkpoints.py").workdir
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{workdir} has no folder checkpoints: give the workdir of a run.")
    print(f"{'step':>10} {'MB':>12}")
    names = sorted(path.name for path in folder.iterdir())
    steps = [str(step) for step in reversed(manifest.list_steps(folder)) if str(step) in names]
    results = [show(folder / step) for step in steps]
    for name in names:
        if name not in steps:
            is_new = name.endswith(manifest.SAVING)
            print(f"{name}: {'is being written, or was' if is_new else 'no checkpoint'}")
    return 0 if all(results) else 1


def show(checkpoint: Path) -> bool:
    """Prints a line, unless the run has removed the checkpoint meanwhile; returns whether it is
    sound.
    """
    state = "sound"
    try:
        manifest.check(checkpoint)
    except (manifest.DamagedError, OSError) as error:
        if not checkpoint.exists():
            return True
        is_damaged = isinstance(error, manifest.DamagedError)
        state = f"{'damaged' if is_damaged else 'cannot be read'}: {error}"
    size = manifest.num_bytes(checkpoint)
    print(f"{checkpoint.name:>10} {size / 1e6:12.1f}  {state}", flush=True)
    return state == "sound"


if __name__ == "__main__":
    sys.exit(exit_status(main))
