"""`tpipe checkpoints`: lists the checkpoints of a run, and says whether each is sound. No jax."""

from pathlib import Path

from tpipe_jax.checkpoint import manifest
from tpipe_jax.config.command_line import parse_checkpoints
from tpipe_jax.config.own_runs import check_links
from tpipe_jax.errors import UserError


def main(args: list[str], program: str) -> int:
    """Runs the command; returns 1 if a checkpoint is damaged, else 0."""
    workdir = parse_checkpoints(args, program).workdir
    check_links(workdir)
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{workdir} has no folder checkpoints: give the workdir of a run.")
    print(f"{'step':>10} {'MB':>12}")
    names = sorted(path.name for path in folder.iterdir())
    steps = [str(step) for step in reversed(manifest.list_steps(folder)) if str(step) in names]
    results = [_show(folder / step) for step in steps]
    for name in names:
        if name not in steps:
            is_new = name.endswith(manifest.SAVING)
            print(f"{name}: {'is being written, or was' if is_new else 'no checkpoint'}")
    return 0 if all(results) else 1


def _show(checkpoint: Path) -> bool:
    """Prints a line, unless the run has removed the checkpoint meanwhile; returns whether it is
    sound.
    """
    state = "sound"
    try:
        manifest.check(checkpoint)
    except (manifest.DamagedError, OSError) as error:
        if not checkpoint.exists():
            return True
        is_damaged = isinstance(error, manifest.DamagedError)
        state = f"{'damaged' if is_damaged else 'cannot be read'}: {error}"
    size = manifest.num_bytes(checkpoint)
    print(f"{checkpoint.name:>10} {size / 1e6:12.1f}  {state}", flush=True)
    return state == "sound"
