"""`tpipe compile`: what a training step needs and does on GPUs or TPUs that are not here."""

from tpipe_jax.config.command_line import parse_compile
from tpipe_jax.runtime.noise import without_noise


def main(args: list[str], program: str) -> None:
    """Runs the command. Raises `UserError` if the step does not fit."""
    flags = parse_compile(args, program)
    with without_noise():  # of libraries that miss the devices
        from tpipe_jax.commands.compile import compile_run
        from tpipe_jax.devices.targets import prepare_compiler
    from tpipe_jax.reporting.console import Console

    prepare_compiler()
    compile_run(flags, Console())
