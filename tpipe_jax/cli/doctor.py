"""`tpipe doctor`: what this machine has, and what a run here would use."""

from tpipe_jax.config.command_line import parse_doctor


def main(args: list[str], program: str) -> None:
    """Runs the command."""
    flags = parse_doctor(args, program)
    from tpipe_jax.commands.doctor import examine
    from tpipe_jax.reporting.console import Console

    console = Console()
    console.show_facts(examine(flags.config, flags.workdir))
