"""What a run's folder says of it: config.json, plan.json and timeline.png."""

import json
from pathlib import Path

from tpipe_jax.config import Config, UserError, from_dict, to_dict
from tpipe_jax.model import forward_flops
from tpipe_jax.plan import Plan
from tpipe_jax.schedule import Schedule
from tpipe_jax.timeline import draw_timeline

FILES = ("plan.json", "timeline.png", "metrics.jsonl")


def changed_settings(config: Config, workdir: Path) -> list[str]:
    """Settings that differ from those of the run that is in the folder already, as text.

    Raises `UserError` for a folder whose files are not of a run, since they would be overwritten.
    """
    try:
        path = workdir / "config.json"
        if not path.exists():
            foreign = [name for name in FILES if (workdir / name).exists()]
            if foreign:
                raise UserError(f"{foreign[0]} without one")
            return []
        before = to_dict(from_dict(json.loads(path.read_text())))
    except (UserError, ValueError, OSError, AttributeError) as error:
        raise UserError(
            f"--workdir={workdir} is not the folder of a run, which has a config.json ({error}): "
            "choose another folder."
        ) from error
    return [
        f"config.{section}.{name} {before[section][name]} -> {value}"
        for section, fields in to_dict(config).items()
        for name, value in fields.items()
        if before[section][name] != value
    ]


def describe_in_files(config: Config, workdir: Path, plan: Plan, schedule: Schedule) -> None:
    """Writes config.json, plan.json and timeline.png. Raises `UserError` if it cannot."""
    cost = [
        item.num_rows * forward_flops(config.model, item.num_tokens, item.token) / 1e9
        for item in schedule.items
    ]
    title = (
        f"{len(schedule.items)} slices ({'sequences x ' * (plan.batch_size > 1)}tokens) on "
        f"{schedule.num_stages} stages, as wide as their floating-point operations"
    )
    path = workdir / "timeline.png"
    try:
        (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
        plan.save(workdir / "plan.json")
        # A backward pass takes about twice the operations of a forward pass.
        draw_timeline(path, schedule, cost, [2 * c for c in cost], title, "GFLOP in a layer")
    except OSError as error:
        raise UserError(
            f"cannot write to --workdir={workdir} ({error.strerror}: {error.filename}): make it "
            "writable, or choose another folder."
        ) from error
