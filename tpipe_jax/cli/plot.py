"""`tpipe plot`: the losses of one run or several as a picture. No jax."""

from pathlib import Path

from tpipe_jax.config.command_line import parse_plot


def main(args: list[str], program: str) -> None:
    """Runs the command."""
    flags = parse_plot(args, program)
    from tpipe_jax.reporting.loss_plot import FILE, draw_losses

    is_one = len(flags.workdirs) == 1
    path = flags.out or (flags.workdirs[0] / FILE if is_one else Path(FILE))
    draw_losses(flags.workdirs, path, "--out")
    print(f"the picture is {path}")
