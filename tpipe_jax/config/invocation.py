"""How the user calls our programs, so that we name the next one in the same way. No jax."""

import shlex
import sys
from pathlib import Path

_SCRIPTS = {"train": "multihost"}  # in launch/, where the name differs


def command(name: str) -> str:
    """Returns how to call the command of this name: in the way that this program was called.

    That is `tpipe NAME`, `python launch/NAME.py` or `python -m tpipe_jax NAME`.
    """
    script = Path(sys.argv[0])
    if script.parent.name == "launch" and script.suffix == ".py":
        return f"python {shlex.quote(f'{script.with_name(_SCRIPTS.get(name, name))}.py')}"
    return f"tpipe {name}" if script.stem == "tpipe" else f"python -m tpipe_jax {name}"
