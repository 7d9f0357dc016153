"""Runs a program as one of a run's processes, or starts all of them on this machine."""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from shutil import get_terminal_size
from typing import IO, Any

from tpipe_jax.config.command_line import without_option
from tpipe_jax.config.flags import Flags, PlanFlags
from tpipe_jax.errors import UserError
from tpipe_jax.runtime.exits import STOP_STATUSES, UNREAD, heeded
from tpipe_jax.runtime.outputs import Unwritable

GRACE_SECONDS = 10  # for the others to end by themselves after one has failed
RESTART_SECONDS = 20  # for processes started elsewhere to notice that one has failed
# Done, user error, stopped, output not read any more: starting again would not help.
FINAL = (0, 2, *STOP_STATUSES, UNREAD)
LIFELINE = "TPIPE_JAX_LIFELINE"  # variable: descriptor of a pipe that breaks with the launcher

Child = subprocess.Popen[str]


class Children(list[Child]):
    """The processes that run now. They get all signals that this one gets, and a pipe."""

    def __init__(self, lifeline: int) -> None:
        super().__init__()
        self.received: list[int] = []
        """Signals to this process so far."""
        self._lifeline = lifeline

    def start(self, command: Sequence[str], is_relayed: bool = False) -> Child:
        """Starts a process in a session of its own, so that only this process sends it signals."""
        environ = os.environ | {LIFELINE: str(self._lifeline)}
        if is_relayed:
            width = get_terminal_size().columns - len("[0] ")
            environ |= {"PYTHONUNBUFFERED": "1", "COLUMNS": str(width)}
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if is_relayed else None,
            stdout=subprocess.PIPE if is_relayed else None,
            stderr=subprocess.PIPE if is_relayed else None,
            encoding="locale",  # which the process has too
            errors="replace",
            env=environ,
            start_new_session=True,
            pass_fds=[self._lifeline],
        )
        self.append(child)
        for number in self.received:  # before it was there
            child.send_signal(number)
        return child

    def pass_on(self, number: int, _: Any = None) -> None:
        """Passes a signal on to the processes, which know what to do."""
        self.received.append(number)
        for child in self:
            child.send_signal(number)  # does nothing if it has ended


def supervise(argv: Sequence[str], flags: Flags | PlanFlags) -> int:
    """Runs the program in a process of its own, or in as many local processes as are asked for.
    Starts it again when it has failed, as often as restarts are allowed. Returns the last exit
    status.

    Raises `UserError` if the local processes do not divide the devices.
    """
    num_left = flags.processes.max_restarts
    argv = without_option(list(argv), "max-restarts")
    with _supervised() as children:
        while True:
            children.clear()
            if flags.processes.local_processes is None:
                children.start([sys.executable, *argv])
                status = _wait(children)
            else:
                status = start_local(argv, flags, children)
            if status in FINAL or children.received or not num_left:
                return status
            num_left -= 1
            _say(f"starting again from the last checkpoint; {num_left} more restarts are allowed")
            deadline = time.monotonic() + RESTART_SECONDS
            while flags.processes.local_processes is None and time.monotonic() < deadline:
                time.sleep(0.1)
                if children.received:
                    return status


def end_with_launcher() -> None:
    """Stops this process, as a closed terminal would, when the launcher that started it is gone."""
    lifeline = os.environ.pop(LIFELINE, None)
    if lifeline is None:
        return
    number = signal.SIGHUP if signal.SIGHUP in heeded() else signal.SIGTERM

    def watch() -> None:
        os.read(int(lifeline), 1)  # nothing is ever written
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


def start_local(argv: Sequence[str], flags: Flags | PlanFlags, children: Children) -> int:
    """Starts the program once for each local process, and relays what the processes print, line by
    line.

    Cores and devices are shared out evenly. `children` is filled with the processes. Returns 0 if
    all processes end with 0. Else returns the status of the one that failed first, after which the
    others are ended. Raises `UserError` if the processes do not divide the devices, and
    `Unwritable`, at the end, if a command should end where its output cannot be written.
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
    relays, lost = [], list[Unwritable]()
    for i in range(num_processes):
        ids = map(str, range(i * num_own, (i + 1) * num_own))
        own = [*command, f"--process-id={i}", "--local-device-ids", *ids]
        with _on_its_cores(i, num_processes):
            child = children.start(own, is_relayed=True)
        for source, target in ((child.stdout, sys.stdout), (child.stderr, sys.stderr)):
            relays.append(threading.Thread(target=_relay, args=(f"[{i}] ", source, target, lost)))
            relays[-1].start()
    status = _wait(children)
    for relay in relays:
        relay.join()
    if lost and not status:
        raise lost[0]
    return status


def _wait(children: Sequence[Child]) -> int:
    """Waits for all processes. Returns 0, or the exit status of the process that failed first.

    Says which process failed first. Kills the processes that do not end by themselves after that.
    """
    first, deadline, hanging = None, math.inf, []
    while None in (codes := [child.poll() for child in children]) or (first is None and any(codes)):
        if first is None and any(codes):
            first = next(i for i, code in enumerate(codes) if code)
            deadline = time.monotonic() + GRACE_SECONDS
        if time.monotonic() > deadline:
            hanging = [i for i, code in enumerate(codes) if code is None]
            for i in hanging:
                children[i].kill()
            deadline = math.inf
        time.sleep(0.05)
    if first is None:
        return 0
    code = children[first].returncode
    # Processes that all end with the same status have told each other why, and printed it.
    is_alike = all(child.returncode == code for child in children)
    if code < 0 or not (is_alike or code in FINAL):
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        is_alone = len(children) == 1
        _say(f"the process {how}" if is_alone else f"process {first} {how}, before the others")
    reason = (
        "it waited for the other" if code == -signal.SIGKILL else "it may be the one that hangs"
    )
    for i in hanging:
        _say(f"process {i} did not end by itself and was killed: {reason}")
    return code if code > 0 else 128 - code


@contextmanager
def _on_its_cores(index: int, num_processes: int) -> Iterator[None]:
    """Runs processes started inside on one process's share of the cores, or on all if there are too
    few.
    """
    before = os.sched_getaffinity(0)
    num_own = len(before) // num_processes
    if num_own:
        os.sched_setaffinity(0, sorted(before)[index * num_own : (index + 1) * num_own])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def _supervised() -> Iterator[Children]:
    """Yields the processes, to which the signals go that stop a program. Kills at the end the
    processes that still run.
    """
    lifeline, own_end = os.pipe()  # its own end is in no other process, so it breaks with this one
    children = Children(lifeline)
    before = {number: signal.signal(number, children.pass_on) for number in heeded()}
    try:
        yield children
    finally:
        for child in children:
            child.kill()  # those that an error has left running
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(lifeline)
        os.close(own_end)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _relay(prefix: str, source: IO[str] | None, target: IO[str], lost: list[Unwritable]) -> None:
    """Copies lines, and goes on reading when they cannot be written: else processes would wait."""
    assert source is not None
    with source:
        for line in source:
            # Gloo prints a line for each group of processes, and its threads may break the lines.
            is_gloo = line.startswith("[Gloo] ") or "connected peer ranks is" in line
            if is_gloo or not line.strip():
                continue
            try:
                target.write(prefix + line.rstrip("\n") + "\n")  # in one piece, so lines don't mix
                target.flush()
            except Unwritable as error:
                lost.append(error)
