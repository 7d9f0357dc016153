"""Files that cannot be written. No jax."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpipe_jax.config import UserError


@contextmanager
def writing_to(workdir: Path, option: str = "--workdir") -> Iterator[None]:
    """Answers a file or folder that cannot be written with a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {option}={workdir} ({error.strerror}: {error.filename}): make it "
            "writable, or choose another folder."
        ) from error
