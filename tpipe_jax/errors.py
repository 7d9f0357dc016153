"""What a user can mend, as one sentence. No jax."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend: one sentence with setting, value, rule and remedy."""


class Infeasible(UserError):
    """These settings cannot work, and every process finds so on its own; a search over meshes may
    skip them and go on.
    """


@contextmanager
def writing_to(workdir: Path, option: str = "--workdir") -> Iterator[None]:
    """Turns an OSError into a `UserError`: a file or folder below `workdir` cannot be written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {option}={workdir} ({error.strerror}: {error.filename}): make it "
            "writable, or choose another folder."
        ) from error


def brief(error: Exception) -> str:
    """The message of an error in at most 160 characters."""
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")
