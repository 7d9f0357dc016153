"""`tpipe train`, and launch/multihost.py: trains in one process or several. No jax."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tpipe_jax.cli.next_steps import next_steps
from tpipe_jax.commands.launch import launch
from tpipe_jax.config.command_line import parse
from tpipe_jax.config.flags import Flags
from tpipe_jax.config.settings import Config
from tpipe_jax.reporting.console import Console


def main(args: list[str], program: str) -> int:
    """Runs the command; returns the exit status."""
    flags = parse(args, program)
    return launch(flags, partial(_work, flags))


def _work(
    flags: Flags, config: Config, workdir: Path, devices: Sequence[Any], console: Console
) -> int:
    from tpipe_jax.commands.train import train
    from tpipe_jax.reporting.step_profile import parse_steps

    profiled = parse_steps(flags.profile, flags.config.train)
    ending = train(config, workdir, devices, console, profiled)
    if ending.num_steps is not None:
        console.show_commands("what next:", next_steps(config, workdir, ending.num_steps))
    return ending.status
