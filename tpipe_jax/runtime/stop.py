"""Keeps a request to stop, made with Ctrl-C or another signal, until the run can follow it."""

import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

import jax

from tpipe_jax.runtime.exits import STOPS, heeded, is_insisted
from tpipe_jax.runtime.failures import end_stopped
from tpipe_jax.runtime.processes import from_all, stop_notices

PATIENCE_SECONDS = 5  # for the main thread to follow a second Ctrl-C

# What a run answers to a request to stop, by what it does.
MEASURING = "Stopping; nothing is lost, and measurements that are complete are kept."
TRAINING = "Finishing the step and saving; once more stops without saving."


class Stopped(Exception):
    """A stop was asked for while there was nothing to save."""


class Stop:
    """Whether a stop was asked for in any process, from `__enter__` to `__exit__`.

    All signals of `exits.STOPS` ask for it. A second Ctrl-C raises KeyboardInterrupt. So does a
    second SIGTERM if there is one process. If there are several, jax handles SIGTERM, and tells all
    of them.
    """

    def __init__(self, say: Callable[[str], None], answer: str = TRAINING) -> None:
        self.answer = answer
        """What is said when a stop is asked for."""
        self._say, self._is_due = say, False
        self._received: list[int] = []
        self._is_alone = jax.process_count() == 1
        self._before: dict[signal.Signals, object] = {}
        self._left = threading.Event()

    def __enter__(self) -> Self:
        numbers = heeded()
        if self._is_alone:
            self._asked = lambda: bool(self._received)
        else:
            self._asked = stop_notices()
            numbers.remove(signal.SIGTERM)
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._left.set()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyrefly: ignore[bad-argument-type]
        signal.set_wakeup_fd(self._fd_before)
        self._writer.close()

    def is_due(self) -> bool:
        """Whether the run should stop. All processes call this equally often. It becomes True at
        the same call in all of them, and stays True.
        """
        self._is_due = self._is_due or self._asked()
        return self._is_due

    def status(self) -> int:
        """Returns the exit status of a run that has stopped: 130 after Ctrl-C in any process, 143
        after SIGTERM alone. All processes call this equally often.
        """
        own = self._received[0] if self._received else signal.SIGTERM  # another process got it
        firsts = from_all(str(int(own)))
        return 128 + next(number for number in STOPS if str(int(number)) in firsts)

    def check(self) -> None:
        """Raises `Stopped` if a stop is due."""
        if self.is_due():
            raise Stopped

    def request(self) -> None:
        """Asks for a stop, in this process."""
        if self._is_alone:
            self._is_due = True
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def _watch(self) -> None:
        """Ends the run PATIENCE_SECONDS after a second Ctrl-C, if it still runs. Python's handlers
        wait for the main thread, which may wait for a device for ever.
        """
        received: list[int] = []
        with self._reader:
            while number := self._reader.recv(1):
                if number[0] not in self._before:
                    continue
                is_last = is_insisted(number[0], received)
                received.append(number[0])
                if is_last and not self._left.wait(PATIENCE_SECONDS):
                    end_stopped()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if is_insisted(number, self._received):
            raise KeyboardInterrupt
        self._received.append(number)
        if len(self._received) > 1:
            return
        with suppress(RuntimeError):  # the signal interrupted another output
            self._say(self.answer)
        if not self._is_alone:
            self.request()
