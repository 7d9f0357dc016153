"""How a run fails: all processes are told of the first failure, and end with its exit status.

A process that fails leaves its error in the coordination service of process 0. All other processes
look there all the time, and end when they find an error, whatever they are waiting for. They may be
waiting in a collective that the failed process will never join. A process that hangs fails too: one
of its own threads notices.
"""

import json
import math
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from jax._src import distributed  # the coordination service's values have no public name yet
from jax.errors import JaxRuntimeError

from tpipe_jax.errors import UserError
from tpipe_jax.runtime.exits import stop_status

POLL_SECONDS = 0.5  # between two checks for another process's error, or for a step that is late
FAREWELL_SECONDS = 15  # by then all processes should have seen an error, on a busy machine too
SERVICE_SECONDS = 3  # for which process 0 stays after that, while the others end
KEY = "tpipe_jax/failure"

Expect = Callable[[str, float], None]


@dataclass(frozen=True)
class Failure:
    """Why a process ends; all processes are told this."""

    status: int
    text: str
    """One sentence, or a traceback."""
    is_hang: bool = False
    """Whether the process hangs. Others may then hang too, so each prints where it is."""
    process: int = 0
    host: str = ""


STOPPED = Failure(130, "stopped")

_ending = threading.Lock()  # held by the thread that ends the process


@contextmanager
def ending_together() -> Iterator[None]:
    """Ends all processes when one fails inside, with the exit status of the one that failed."""
    left = threading.Event()

    def watch() -> None:
        while not left.wait(POLL_SECONDS):
            failure = _published()
            if failure and failure.process != distributed.global_state.process_id:
                _end(failure)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except BaseException as error:  # Ctrl-C too
        _end(_publish(_failure_of(error)))
    left.set()
    watcher.join()


@contextmanager
def watched(give_up: Callable[[str], NoReturn] | None = None) -> Iterator[Expect]:
    """Yields a function with which the process says what it does next, and how many seconds that
    may take. If it takes longer, `give_up` is called. By default that ends all processes of the run
    and prints the stacks of all their threads.

    While the process is stopped (Ctrl-Z), no time passes.
    """
    give_up = give_up or end_hanging
    lock, left = threading.Lock(), threading.Event()
    what, remaining, since = "", math.inf, time.monotonic()

    def expect(next_what: str, seconds: float) -> None:
        nonlocal what, remaining, since
        with lock:
            what, remaining, since = next_what, seconds, time.monotonic()

    def watch() -> None:
        nonlocal remaining, since
        while not left.wait(max(0.0, min(remaining, POLL_SECONDS))):
            with lock:
                now = time.monotonic()
                remaining -= min(now - since, 2 * POLL_SECONDS)
                since, is_late = now, remaining <= 0
            if is_late:
                give_up(what)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield expect
    finally:
        left.set()
        watcher.join()


def end_hanging(text: str) -> NoReturn:
    """Ends all processes, with a text and with the stacks of all their threads."""
    _end(_publish(Failure(1, f"{text}\n{_stacks()}", is_hang=True)))


def end_stopped() -> NoReturn:
    """Ends all processes, as a second Ctrl-C does."""
    _end(_publish(STOPPED))


def print_error(text: str) -> None:
    """Prints to stderr. Does nothing if nobody reads it any more."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, end="\n" if text else "", flush=True)


def _failure_of(error: BaseException) -> Failure:
    if isinstance(error, UserError):
        return Failure(2, f"error: {error}")
    if isinstance(error, KeyboardInterrupt):
        return replace(STOPPED, status=stop_status(error))
    return Failure(1, "".join(traceback.format_exception(error)).rstrip())


def _publish(failure: Failure) -> Failure:
    """Tells the other processes of a failure. Returns the first failure, of this process or of
    another.
    """
    if _client() is None:
        return failure
    own = replace(failure, process=distributed.global_state.process_id, host=socket.gethostname())
    try:
        _client().key_value_set(KEY, json.dumps(vars(own)))
    except JaxRuntimeError:  # there is one already, or process 0 is gone
        return _published() or own
    return own


def _published() -> Failure | None:
    """Returns the failure that has been published, or None."""
    try:
        return Failure(**json.loads(_client().key_value_try_get(KEY)))
    except JaxRuntimeError:
        return None


def _end(failure: Failure) -> NoReturn:
    """Prints the failure, in the process that failed and in process 0, and ends this process."""
    _ending.acquire()
    own = distributed.global_state.process_id
    if failure.process == own:
        print_error(failure.text)
    else:
        if own == 0:
            print_error(f"process {failure.process} on {failure.host}: {failure.text}")
        if failure.is_hang:
            print_error(f"meanwhile process {own} was here:\n{_stacks()}")
    if _client() is not None:
        with suppress(Exception):  # process 0 has the error, so it stays until all have read it
            _client().wait_at_barrier("tpipe_jax/farewell", 1000 * FAREWELL_SECONDS)
        if own == 0:
            time.sleep(SERVICE_SECONDS)  # if process 0 ended first, jax would abort the others
        elif failure.process != own:
            time.sleep(POLL_SECONDS)  # so that the launcher sees the failed process end first
    os._exit(failure.status)  # threads and collectives may never end


def _stacks() -> str:
    """Returns where each thread is, as text. Leaves out the calling thread; the main one comes
    last.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    names.pop(threading.get_ident(), None)
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] == main)
    return "\n".join(
        f"Thread {names[ident]} (most recent call last):\n"
        + "".join(traceback.format_stack(frame)).rstrip()
        for ident, frame in frames
        if ident in names
    )


def _client() -> Any:
    return distributed.global_state.client
