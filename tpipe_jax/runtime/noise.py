"""Keeps back what libraries print. No jax."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from tpipe_jax.errors import UserError


@contextmanager
def without_noise() -> Iterator[None]:
    """Keeps back what libraries write to the standard error stream. It is shown after an exception
    that is not a `UserError`.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.NamedTemporaryFile(prefix="tpipe_stderr_") as noise:  # left if XLA aborts
        os.dup2(noise.fileno(), 2)
        try:
            yield
        except UserError:
            raise
        except Exception:
            noise.seek(0)
            os.write(kept, noise.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)
