"""Runs a program in one process or in several."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tpipe_jax.config.flags import Flags, PlanFlags
from tpipe_jax.config.settings import Config
from tpipe_jax.runtime.launcher import end_with_launcher, supervise
from tpipe_jax.runtime.outputs import leave_out

# Its arguments are config, workdir, devices and console; it returns the exit status.
Main = Callable[[Config, Path, Sequence[Any], Any], int]


def launch(flags: Flags | PlanFlags, main: Main) -> int:
    """Runs `main` here, or starts and supervises processes that do; returns the exit status.

    A run that trains goes on when its output cannot be written.
    """
    end_with_launcher()
    if isinstance(flags, Flags):
        leave_out(flags.workdir)
    if flags.processes.local_processes is not None or flags.processes.max_restarts:
        status = supervise(sys.orig_argv[1:], flags)
        if isinstance(flags, Flags):
            leave_out(flags.workdir)  # says what it could not say before there was a workdir
        return status
    # Imported late, so that a mistake in the flags is answered at once.
    import jax

    from tpipe_jax.devices.startup import find_devices
    from tpipe_jax.reporting.console import Console
    from tpipe_jax.runtime.processes import joined

    with joined(flags) as num_processes:
        devices = find_devices(flags.config.mesh, num_processes)
        console = Console(is_quiet=jax.process_index() > 0)
        return main(flags.config, flags.workdir, devices, console)
