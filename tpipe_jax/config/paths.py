"""Paths as users write them. No jax."""

import os
import re
from pathlib import Path

from tpipe_jax.errors import UserError

_SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]+://?")


def expanded(name: str, value: str) -> Path:
    """Returns the path in a setting or a flag, with `~` as the home folder. Raises `UserError` for
    an address, as gs://bucket/x, which would be a folder called `gs:`.
    """
    if is_address(value):
        raise UserError(f"{name}={value} {NO_ADDRESS}.")
    return Path(os.path.expanduser(value))


def is_address(value: str) -> bool:
    """Whether a value is an address and no path."""
    return bool(_SCHEME.match(value)) and not os.path.exists(value)


NO_ADDRESS = "is an address, and only files are read and written: copy it to a disk, or mount it"
