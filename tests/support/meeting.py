"""A small program: joins the other processes of its flags, and counts their devices."""

import sys

import jax

from tpipe_jax.config.command_line import parse
from tpipe_jax.devices.startup import find_devices
from tpipe_jax.runtime.exits import exit_status
from tpipe_jax.runtime.processes import joined


def main() -> None:
    flags = parse(sys.argv[1:], program="meeting.py")
    with joined(flags) as num_processes:
        find_devices(flags.config.mesh, num_processes)
        print(num_processes, jax.device_count(), flush=True)


if __name__ == "__main__":
    sys.exit(exit_status(main))
