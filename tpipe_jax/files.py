"""Turns failed writes into user errors, and locks folders for one process. No jax."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tpipe_jax.errors import UserError


@contextmanager
def as_user_error(sentence: Callable[[OSError], str]) -> Iterator[None]:
    """Turns an OSError raised inside into a `UserError` whose text is `sentence(error)`."""
    try:
        yield
    except OSError as error:
        raise UserError(sentence(error)) from error


def writing_to(folder: Path, option: str = "--workdir") -> AbstractContextManager[None]:
    """Turns an OSError raised inside into a `UserError`, which says that the folder named by
    `option` cannot be written.
    """
    return as_user_error(
        lambda error: (
            f"cannot write to {option}={folder} ({error.strerror}: {error.filename}): make it "
            "writable, or choose another folder."
        )
    )


@contextmanager
def locked(descriptor: int, sentence: str, is_needed: bool) -> Iterator[None]:
    """Keeps other processes out of an open folder until the block or this process ends, and closes
    the folder.

    Raises `UserError` with `sentence` if another process has locked the folder. On a file system
    without locks it raises OSError if the lock is needed; else other processes are not kept out.
    """
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(sentence) from None
        except OSError:
            if is_needed:
                raise
        yield
    finally:
        os.close(descriptor)
