"""Turns failed writes into user errors, locks folders, and waits for the disk. No jax."""

import errno
import fcntl
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tpipe_jax.errors import UserError

# What file systems answer that do not have a call, as Lustre, CIFS and those of FUSE.
UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


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
def locked(descriptor: int, folder: Path, sentence: str) -> Iterator[None]:
    """Keeps other processes out of an open folder until the block or this process ends, and closes
    the folder.

    Raises `UserError` with `sentence` if another process has locked the folder. On a file system
    without locks it says that other processes are not kept out.
    """
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(sentence) from None
        except OSError as error:
            note_once(
                f"{folder} cannot be locked ({error.strerror}), so nothing keeps a second command "
                "out of it: start none there before this one has ended"
            )
        yield
    finally:
        os.close(descriptor)


def sync(descriptor: int, what: str) -> None:
    """Returns when an open file or folder is on the disk. On a file system that cannot tell, says
    so once for `what`.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        note_once(
            f"this file system cannot say when {what} are on the disk ({error.strerror}): the "
            "newest checkpoint may be lost, or found damaged, if the machine crashes"
        )


def note_once(text: str) -> None:
    """Prints a line to stderr, the first time in this process."""
    with _noting:
        if text not in _noted:
            _noted.add(text)
            print(f"note: {text}", file=sys.stderr, flush=True)


_noted: set[str] = set()
_noting = threading.Lock()  # checkpoints are written in several threads
