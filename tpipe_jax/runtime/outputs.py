"""Standard output and standard error of a program: closed ones, and what cannot be written. No jax.

A command whose output nobody reads ends. A run of hours goes on, and says once what it leaves out.
"""

import errno
import io
import os
import select
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

NAMES = {1: "standard output", 2: "standard error"}
NOTE = "output_lost.txt"  # in the workdir of a run that could say it nowhere else


class Unwritable(OSError):
    """Standard output cannot be written."""


class _Lost:
    """What is done about output that cannot be written."""

    def __init__(self) -> None:
        self.closed: set[int] = set()
        """Outputs that were closed when the program started."""
        self.is_left_out = False
        self.workdir: Path | None = None
        self._told: set[int] = set()
        self._lock = threading.RLock()  # the main thread may be interrupted while it holds it

    def add(self, descriptor: int, error: OSError) -> None:
        """Raises `Unwritable` if a command should end by it. In a run, says so, once."""
        if not self.is_left_out and descriptor != 2:
            raise Unwritable(error.errno, error.strerror, NAMES[descriptor]) from error
        if self.workdir is None:
            return
        with self._lock:
            if descriptor in self._told:
                return
            text = (
                f"note: {NAMES[descriptor]} cannot be written ({error.strerror}): it is left out, "
                "and the run goes on\n"
            )
            if (descriptor != 2 and self._print(text)) or self._write(text, self.workdir):
                self._told.add(descriptor)

    def _print(self, text: str) -> bool:
        with suppress(OSError):
            return 2 not in self.closed and os.write(2, text.encode()) > 0
        return False

    def _write(self, text: str, workdir: Path) -> bool:
        with suppress(OSError):
            if workdir.is_dir():  # a run that is refused makes none
                with (workdir / NOTE).open("a", encoding="utf-8") as file:
                    file.write(text)
                return True
        return False


_lost = _Lost()


class _Output(io.FileIO):
    """Standard output or standard error, whose errors can be told from those of other files."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data: Any) -> int:
        """Writes all of the data, or leaves out the rest."""
        rest, descriptor = memoryview(data).cast("B"), self.fileno()
        num_bytes = len(rest)
        try:
            if descriptor in _lost.closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            while rest:
                num_written = super().write(rest)
                if num_written is None:  # a pipe that is full, and does not block
                    select.select([], [descriptor], [])
                rest = rest[num_written or 0 :]
        except OSError as error:
            _lost.add(descriptor, error)
        return num_bytes


def prepare() -> None:
    """Makes the standard streams of this program usable. Call it before a file is opened.

    Descriptors that are closed get /dev/null: else the next file that is opened would have their
    number, and what libraries print would go into it. Characters that the encoding does not have
    are printed as escapes. What cannot be written raises `Unwritable`, or is left out if it is of
    standard error.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest number
            _lost.closed.add(descriptor)
    sys.stdout = _prepared(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _prepared(sys.stderr, sys.__stderr__, 2)


def leave_out(workdir: Path | None = None) -> None:
    """From now on leaves out what cannot be written.

    With a workdir, says so once for each output: on standard error, or in a file of the workdir.
    """
    _lost.is_left_out, _lost.workdir = True, workdir
    for descriptor in sorted(_lost.closed - {0}):
        _lost.add(descriptor, OSError(errno.EBADF, os.strerror(errno.EBADF)))


def _prepared(stream: TextIO | None, own: TextIO | None, descriptor: int) -> TextIO:
    """Returns the stream, or one that takes its place if it is Python's own."""
    if stream is not None and (stream is not own or not isinstance(stream, io.TextIOWrapper)):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        return stream
    raw = _Output(descriptor)
    if stream is None:
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace")
    stream.flush()
    is_buffered = isinstance(stream.buffer, io.BufferedWriter)  # not with python -u
    return io.TextIOWrapper(
        io.BufferedWriter(raw) if is_buffered else raw,  # pyrefly: ignore[bad-argument-type]
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
