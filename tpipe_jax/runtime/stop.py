"""Keeps a request to stop, made with Ctrl-C or SIGTERM, until the run can follow it."""

import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Self

import jax

from tpipe_jax.runtime.failures import end_stopped
from tpipe_jax.runtime.processes import from_all, stop_notices

PATIENCE_SECONDS = 5  # for the main thread to follow a second Ctrl-C
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}  # exit statuses, as a shell has them

# What a run answers to a request to stop, by what it does.
MEASURING = "Stopping; nothing is lost, and measurements that are complete are kept."
TRAINING = "Finishing the step and saving; once more stops without saving."


class Stopped(Exception):
    """A stop was asked for while there was nothing to save."""


class Stop:
    """Whether a stop was asked for in any process, from `__enter__` to `__exit__`.

    A second Ctrl-C raises KeyboardInterrupt. So does a second SIGTERM if there is one process. If
    there are several, jax handles SIGTERM, and tells all of them.
    """

    def __init__(self, say: Callable[[str], None], answer: str = TRAINING) -> None:
        self.answer = answer
        """What is said when a stop is asked for."""
        self._say, self._is_due, self._num_signals = say, False, 0
        self._first = signal.SIGTERM  # where another process got the signal
        self._is_alone = jax.process_count() == 1
        self._before: dict[signal.Signals, object] = {}
        self._left = threading.Event()

    def __enter__(self) -> Self:
        numbers = [signal.SIGINT]
        if self._is_alone:
            self._asked = lambda: self._num_signals > 0
            numbers.append(signal.SIGTERM)
        else:
            self._asked = stop_notices()
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
        """Returns the exit status of a run that has stopped: 130 after Ctrl-C in any process, else
        143. All processes call this equally often.
        """
        firsts = from_all(str(int(self._first)))
        return STATUS[signal.SIGINT if str(int(signal.SIGINT)) in firsts else signal.SIGTERM]

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
        """Ends the run PATIENCE_SECONDS after a second signal, if it still runs. Python's handlers
        wait for the main thread, which may wait for a device for ever.
        """
        num_signals = 0
        with self._reader:
            while number := self._reader.recv(1):
                num_signals += number[0] in self._before
                if num_signals > 1 and not self._left.wait(PATIENCE_SECONDS):
                    end_stopped()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._num_signals:
            raise KeyboardInterrupt
        self._num_signals += 1
        self._first = signal.Signals(number)
        with suppress(RuntimeError):  # the signal interrupted another output
            self._say(self.answer)
        if not self._is_alone:
            self.request()
