"""`tpipe plot`: the losses of one run or several as a picture. No jax."""

from pathlib import Path

from tpipe_jax.config.command_line import parse_plot
from tpipe_jax.config.own_runs import check_links


def main(args: list[str], program: str) -> None:
    """Runs the command."""
    flags = parse_plot(args, program)
    from tpipe_jax.reporting.loss_plot import FILE, draw_losses

    workdirs = list(flags.workdirs)
    for workdir in workdirs:
        check_links(workdir)
    if len(workdirs) > 1:  # as runs/*, which may have a folder of a plan
        for workdir in flags.workdirs:
            if not (workdir / "metrics.jsonl").exists():
                print(f"{workdir} is left out: it has no metrics.jsonl")
                workdirs.remove(workdir)
    path = flags.out or (workdirs[0] / FILE if len(workdirs) == 1 else Path(FILE))
    draw_losses(workdirs, path, "--out")
    print(f"the picture is {path}")
