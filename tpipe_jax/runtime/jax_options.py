"""Options of jax that would make it compute otherwise than the code expects. No jax at first.

A user may have set them, in the environment, for programs of their own.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

OFF = ("", "0", "false", "f", "off", "no", "n")  # of an option that is true or false, as jax has it
# Each is a variable of the environment in capitals, and the option that jax.config has.
NEEDED: dict[str, str] = {
    "jax_enable_x64": "0",  # types are given where they matter, and are of 32 bits or less
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_disable_jit": "0",  # a step is compiled before it runs
    "jax_debug_key_reuse": "0",
}
OF_PROGRAMS = NEEDED | {"jax_transfer_guard": "allow"}


def set_needed() -> None:
    """Sets the options in the environment of this program, before jax is imported, and says which
    it has changed.
    """
    changed = []
    for option, value in OF_PROGRAMS.items():
        name = option.upper()
        given = os.environ.get(name, value)
        is_off = value == "0" and given.lower() in OFF
        if given != value:
            os.environ[name] = value
            changed += [] if is_off else [f"{name}={given}"]
    if changed:
        print(
            f"note: {' '.join(changed)} would change how jax computes here, and is left out",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def needed() -> Iterator[None]:
    """Sets the options inside, for this thread only: a program of the user keeps its own."""
    import jax

    with ExitStack() as stack:
        for option, value in NEEDED.items():
            make = getattr(jax, option.removeprefix("jax_"))
            stack.enter_context(make(False if value == "0" else value))
        yield
