"""Files that cannot be written, and folders that one process has to itself. No jax."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from tpipe_jax.errors import UserError


@contextmanager
def told_as(sentence: Callable[[OSError], str]) -> Iterator[None]:
    """Turns an OSError into a `UserError` with a sentence of it."""
    try:
        yield
    except OSError as error:
        raise UserError(sentence(error)) from error


def writing_to(folder: Path, option: str = "--workdir") -> AbstractContextManager[None]:
    """Turns an OSError into a `UserError`: the folder that an option names cannot be written."""
    return told_as(
        lambda error: (
            f"cannot write to {option}={folder} ({error.strerror}: {error.filename}): make it "
            "writable, or choose another folder."
        )
    )


@contextmanager
def locked(folder: Path, sentence: str) -> Iterator[None]:
    """Keeps other processes out of a folder; a process that ends leaves it.

    Raises `UserError` with the sentence if another one is in it. Where a file system has no locks,
    nothing keeps them out.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(sentence) from None
        yield
    finally:
        os.close(descriptor)
