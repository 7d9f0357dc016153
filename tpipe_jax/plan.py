"""The plan of a step: how the batch of a data shard and its sequences are cut, in plain numbers."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from tpipe_jax.config import Config, UserError


@dataclass(frozen=True)
class Plan:
    """Batch slices, and the token slices of each, in the order in which they enter the pipeline."""

    num_stages: int
    batch_slices: tuple[int, ...]
    token_slices: tuple[tuple[int, ...], ...]

    @property
    def batch_size(self) -> int:
        """Sequences of one data shard."""
        return sum(self.batch_slices)

    @property
    def seq_len(self) -> int:
        return sum(self.token_slices[0])

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def make_plan(config: Config) -> Plan:
    """The plan that the settings spell out. Raises `UserError` where they don't fit each other."""
    train, mesh = config.train, config.mesh
    if train.batch_size % mesh.data:
        raise UserError(
            f"config.train.batch_size={train.batch_size} is not a multiple of "
            f"config.mesh.data={mesh.data}: set a batch size of "
            f"{mesh.data * max(1, round(train.batch_size / mesh.data))}, or another mesh."
        )
    batch_slices = parse_slices(
        config.plan.batch_slices,
        train.batch_size // mesh.data,
        "config.plan.batch_slices",
        "the batch of one data shard, config.train.batch_size / config.mesh.data",
    )
    token_slices = parse_slices(
        config.plan.token_slices,
        config.model.seq_len,
        "config.plan.token_slices",
        "config.model.seq_len",
    )
    return Plan(mesh.pipe, batch_slices, (token_slices,) * len(batch_slices))


def parse_slices(text: str, total: int, setting: str, total_name: str) -> tuple[int, ...]:
    """Reads `uniform:N` or a list as `96,64,56,40`.

    Uniform slices differ by one where N does not divide the total; the longer ones come first,
    since they have the shorter context. Raises `UserError` for anything but positive lengths that
    sum to `total`.
    """
    kind, _, count = text.partition(":")
    if kind.strip() == "uniform" and count.strip().isdecimal():
        num = int(count)
        if not 1 <= num <= total:
            raise UserError(
                f"{setting}={text} must ask for 1 to {total} slices, since {total_name} is {total}."
            )
        return tuple(total // num + (i < total % num) for i in range(num))
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(
            f"{setting}={text} is neither uniform:N nor a list of positive lengths as 96,64,56,40."
        )
    slices = tuple(map(int, parts))
    if sum(slices) != total:
        raise UserError(
            f"{setting}={text} sums to {sum(slices)}, but {total_name} is {total}: "
            f"change the slices, or let uniform:{min(len(slices), total)} divide it."
        )
    return slices
