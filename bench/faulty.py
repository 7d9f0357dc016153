"""A training run one of whose processes does something bad to itself: what bench/faults.py starts.

The environment variable TPIPE_JAX_FAULT says what, in which process and at which step, as JSON; all
else is as with launch/multihost.py.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tpipe_jax.checkpoint import manifest
from tpipe_jax.commands.launch import launch
from tpipe_jax.config.command_line import parse
from tpipe_jax.runtime.exits import exit_status

FAULT = "TPIPE_JAX_FAULT"
HAPPENS = "the fault happens now"  # printed when it does


def prepare(kind: str, step: int) -> None:
    """Puts the fault where it will happen."""
    from tpipe_jax.checkpoint import checkpoints
    from tpipe_jax.training import step_log

    begin, write, saving = step_log.StepLog.begin, checkpoints.write_arrays, manifest.SAVING

    def happens() -> None:
        print(HAPPENS, file=sys.stderr, flush=True)

    def kill() -> None:
        happens()
        os.kill(os.getpid(), signal.SIGKILL)

    def raise_or_hang(*args: Any) -> None:
        if args[1] == step:
            happens()
            if kind == "raise":
                raise ZeroDivisionError("a fault")
            time.sleep(10**6)
        begin(*args)

    def begin_late(*args: Any) -> None:
        time.sleep(0.2)  # or the run may end before a second one is refused
        begin(*args)

    def kill_half_written(folder: Path, parts: Any) -> Any:
        if folder.name == f"{step}{saving}":
            write(folder, parts[: len(parts) // 2])
            kill()
        return write(folder, parts)

    def kill_before_the_name(folder: Path) -> None:
        if folder.name == f"{step}{saving}":
            kill()  # all is written, and the folder is about to get its name

    def kill_half_removed(path: Path) -> None:
        next(file for file in path.rglob("*") if file.is_file()).unlink()
        kill()

    if kind in ("raise", "hang"):
        step_log.StepLog.begin = raise_or_hang  # pyrefly: ignore[bad-assignment]
    elif kind == "second run":
        step_log.StepLog.begin = begin_late  # pyrefly: ignore[bad-assignment]
    elif kind == "kill in a save":
        checkpoints.write_arrays = kill_half_written
    elif kind == "kill before the name":
        manifest._sync_folder = kill_before_the_name
    elif kind == "kill in a removal":
        manifest._delete = kill_half_removed
    else:
        raise ValueError(kind)


def work(*args: Any) -> int:
    from tpipe_jax.commands.train import train

    return train(*args).status


def main() -> int:
    fault, flags = json.loads(os.environ[FAULT]), parse(sys.argv[1:], "bench/faulty.py")
    if fault and flags.processes.process_id == fault["process"]:
        prepare(fault["kind"], fault["step"])
    return launch(flags, work)


if __name__ == "__main__":
    sys.exit(exit_status(main))
