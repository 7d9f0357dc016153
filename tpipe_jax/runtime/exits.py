"""How a program ends: its exit status, errors as sentences, and signals that stop it. No jax."""

import errno
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from tpipe_jax.errors import UserError
from tpipe_jax.runtime import outputs
from tpipe_jax.runtime.outputs import Unwritable

CLEANUP_SECONDS = 10  # for a program that was told to stop, which may wait for a library
UNREAD = 128 + signal.SIGPIPE  # exit status when nobody reads the output any more

# Signals that ask a program to stop: Ctrl-C, those of closed terminals, of schedulers before the
# time is up, and of used up CPU time. If processes get several, the first here tells the status.
STOPS = (
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
    signal.SIGTERM,
)
STOP_STATUSES = tuple(128 + number for number in STOPS)  # as a shell has them


class Signalled(KeyboardInterrupt):
    """A signal other than Ctrl-C asks the program to stop."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def stop_status(error: KeyboardInterrupt) -> int:
    """Returns the exit status of a program that was stopped."""
    return 128 + (error.number if isinstance(error, Signalled) else signal.SIGINT)


def heeded() -> list[signal.Signals]:
    """Returns the signals that stop this program. With nohup, SIGHUP does not. Scripts start
    programs in the background with SIGINT ignored, and may still send it.
    """
    always = (signal.SIGINT, signal.SIGTERM)
    return [n for n in STOPS if n in always or signal.getsignal(n) != signal.SIG_IGN]


def is_insisted(number: int, before: Sequence[int]) -> bool:
    """Returns whether a signal, after those before, asks for an end at once: a second Ctrl-C or
    SIGTERM. Terminals send SIGHUP twice, and schedulers SIGTERM after another signal.
    """
    if number == signal.SIGINT:
        return bool(before)
    return number == signal.SIGTERM and any(n in (number, signal.SIGINT) for n in before)


def exit_status(program: Callable[[], int | None]) -> int:
    """Runs a program and returns its exit status, or prints its `UserError` and returns 2.

    When the program is stopped by a signal, the process ends at once, with the signal's status
    (130 after Ctrl-C, 143 after SIGTERM). When its output is a pipe that nobody reads any more, as
    after `| head`, the program ends without a word. For other output that cannot be written it
    returns 2.
    """
    outputs.prepare()
    with _stopped_by_signals():
        try:
            try:
                status = _status_of(program)
            except SystemExit:  # after help
                sys.stdout.flush()
                raise
            sys.stdout.flush()
        except Unwritable as error:
            outputs.leave_out()  # Python writes the rest when it ends
            if error.errno == errno.EPIPE:
                return UNREAD
            show_error(f"{error.filename} cannot be written ({error.strerror}): send it elsewhere.")
            return 2
    return status


def show_error(text: str) -> None:
    """Prints a sentence on what went wrong, in red on a terminal."""
    is_red = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    start, end = ("\x1b[31m", "\x1b[0m") if is_red else ("", "")
    print(f"{start}error: {text}{end}", file=sys.stderr)


def _status_of(program: Callable[[], int | None]) -> int:
    try:
        status = program() or 0
    except UserError as error:
        show_error(str(error))
        return 2
    except KeyboardInterrupt as error:
        print("stopped", file=sys.stderr, flush=True)
        status = stop_status(error)
    if status in STOP_STATUSES:  # sys.exit would wait for threads that still compile or save
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    return status


def _end(number: int) -> NoReturn:
    with suppress(OSError):
        os.write(2, b"stopped\n")
    os._exit(128 + number)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Raises `Signalled` in the main thread at the first signal that stops a program, so that it
    removes what it has half written. Ends the program if that takes too long.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        is_first, is_last = not received, is_insisted(number, received)
        received.append(number)
        if is_last:
            _end(number)
        if is_first:
            raise Signalled(number)

    # Python's own handler of Ctrl-C stays.
    numbers = [number for number in heeded() if number != signal.SIGINT]
    before = {number: signal.signal(number, receive) for number in numbers}
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    fd_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    left = threading.Event()

    def watch() -> None:
        with reader:
            while number := reader.recv(1):
                # Python calls the handler only when the main thread comes out of a library.
                is_ours = signal.getsignal(number[0]) is receive
                if is_ours and not left.wait(CLEANUP_SECONDS):
                    _end(number[0])

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        left.set()
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd_before)
        writer.close()
