"""Runs a program as one of a run's processes, or starts all of them on this machine."""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import get_terminal_size
from typing import IO, Any

from tpipe_jax.config import Config, UserError
from tpipe_jax.flags import Flags, without_option

# Of config, workdir, devices and console.
Work = Callable[[Config, Path, Sequence[Any], Any], None]

GRACE_SECONDS = 10  # for the others to end by themselves after one has failed


def launch(flags: Flags, work: Work) -> int:
    """Runs the work in each process; returns the exit status."""
    if flags.processes.local_processes is not None:
        return start_local(sys.argv, flags)
    # Imported late, so that a mistake in the flags is answered at once.
    import jax

    from tpipe_jax.console import Console
    from tpipe_jax.mesh import find_devices
    from tpipe_jax.processes import joined

    with joined(flags) as num_processes:
        devices = find_devices(flags.config.mesh, num_processes)
        work(flags.config, flags.workdir, devices, Console(is_quiet=jax.process_index() > 0))
    return 0


def start_local(argv: Sequence[str], flags: Flags) -> int:
    """Starts the program once for each local process, and relays what they print, line by line.

    Cores and devices are shared out evenly. Returns 0 if all processes end so, else the status of
    the one that failed first; the others are ended then. Raises `UserError` if the devices don't
    divide.
    """
    num_processes, num_devices = flags.processes.local_processes, flags.config.mesh.num_devices
    assert num_processes is not None
    num_own, rest = divmod(num_devices, num_processes)
    if rest:
        raise UserError(
            f"--local-processes={num_processes} does not divide the {num_devices} devices of "
            "config.mesh: start a number that does, or change config.mesh."
        )
    with socket.socket() as probe:  # a port that is free now
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *without_option(list(argv), "local-processes")]
    command += [f"--coordinator=127.0.0.1:{port}", f"--num-processes={num_processes}"]
    children, relays = [], []
    with _passing_signals_to(children):
        for i in range(num_processes):
            ids = map(str, range(i * num_own, (i + 1) * num_own))
            own = [*command, f"--process-id={i}", "--local-device-ids", *ids]
            with _on_its_cores(i, num_processes):
                child = _start(own)
            children.append(child)
            for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
                relays.append(threading.Thread(target=_relay, args=(f"[{i}] ", source, target)))
                relays[-1].start()
        first = _supervise(children)
    for relay in relays:
        relay.join()
    if first is None:
        return 0
    code = children[first].returncode
    if code < 0:
        print(f"process {first} was ended by {signal.Signals(-code).name}", file=sys.stderr)
    return code if code > 0 else 128 - code


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    width = get_terminal_size().columns - len("[0] ")
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": str(width)},
        start_new_session=True,  # Ctrl-C reaches it once, passed on from here
    )


def _supervise(children: Sequence[subprocess.Popen[str]]) -> int | None:
    """Waits for all processes; returns which failed first, if one did."""
    first, deadline = None, math.inf
    while True:
        codes = [child.poll() for child in children]
        if first is None and any(codes):
            first = next(i for i, code in enumerate(codes) if code)
            deadline = time.monotonic() + GRACE_SECONDS
        if None not in codes:
            return first
        if time.monotonic() > deadline:
            for child in children:
                child.kill()
        time.sleep(0.05)


@contextmanager
def _on_its_cores(index: int, num_processes: int) -> Iterator[None]:
    """What is started within runs on its share of the cores, or on all if there are too few."""
    before = os.sched_getaffinity(0)
    num_own = len(before) // num_processes
    if num_own:
        os.sched_setaffinity(0, sorted(before)[index * num_own : (index + 1) * num_own])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _passing_signals_to(children: Sequence[subprocess.Popen[str]]) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to the processes, which know what to do with them."""

    def receive(number: int, _: Any) -> None:
        for child in children:
            child.send_signal(number)  # does nothing if it has ended

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for child in children:
            child.kill()  # those that an error has left running
        for number, handler in before.items():
            signal.signal(number, handler)


def _relay(prefix: str, source: IO[str] | None, target: IO[str]) -> None:
    assert source is not None
    with source:
        for line in source:
            if line.startswith("[Gloo] "):  # which tells of every group of processes it connects
                continue
            target.write(prefix + line.rstrip("\n") + "\n")  # in one piece, so lines don't mix
            target.flush()
