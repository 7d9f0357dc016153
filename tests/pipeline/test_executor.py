"""One lane of the pipeline: which stage works on what, and what becomes of it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax.sharding import PartitionSpec

from tpipe_jax.config.settings import MeshConfig
from tpipe_jax.devices.inplace import Position
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.pipeline.executor import sweep
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.schedule import IDLE, Item, terapipe


class Diary(NamedTuple):
    """What a stage has been given, in order."""

    count: Array
    seen: Array
    """`[items, 3]`: row, token and number of tokens."""


def write_down(chunk: int, x_BLD: Array, at: Position, diary: Diary) -> tuple[Array, Diary]:
    """Appends the number of the stage, from 1, to each value as a decimal."""
    entry = jnp.stack([at.row, at.token, jnp.int32(x_BLD.shape[1])])
    seen = lax.dynamic_update_slice(diary.seen, entry[None], (diary.count, 0))
    return 10 * x_BLD + lax.axis_index("pipe") + 1, Diary(diary.count + 1, seen)


def run_sweep(
    table: np.ndarray, items: Sequence[Item], source_BT1: np.ndarray, reverse: bool
) -> tuple[np.ndarray, Diary]:
    """What each stage has made of the source, and its diary; both with a first axis of stages.

    Only the stage where items enter has the source, the others have NaN.
    """
    P = table.shape[1]
    sources = np.full((P, *source_BT1.shape), np.nan, np.float32)
    sources[P - 1 if reverse else 0] = source_BT1

    def local(sources: Array) -> tuple[Array, Diary]:
        diary = Diary(jnp.int32(0), jnp.zeros((2 * len(items), 3), jnp.int32))
        result = sweep(table, items, write_down, sources[0], diary, reverse=reverse)
        return jax.tree.map(lambda a: a[None], result)

    spec = PartitionSpec("pipe")
    # Results may differ along 'data' too, which has a single shard here.
    out_specs = PartitionSpec(("pipe", "data"))
    devices = make_mesh(MeshConfig(pipe=P), jax.devices()[:P])
    run = jax.shard_map(local, mesh=devices, in_specs=spec, out_specs=out_specs)
    return jax.tree.map(np.asarray, jax.jit(run)(sources))


PLANS = {
    "one item": Plan(4, (2,), ((5,),)),
    "equal slices": Plan(4, (1,), ((2, 2, 2, 2, 2, 2),)),
    "slices of several shapes": Plan(4, (1, 2), ((3, 5, 2), (4, 3, 3))),
    "one stage": Plan(1, (1, 1), ((3, 1), (2, 2))),
}


def other_table(plan: Plan, reverse: bool) -> np.ndarray:
    """A table with another order of items, where some wait before they enter, and all stages before
    the first and after the last.
    """
    num_items, P = sum(map(len, plan.token_slices)), plan.num_stages
    order = [*range(1, num_items, 2), *range(0, num_items, 2)]
    entries = np.cumsum([2, *(1 + i % 3 for i in range(num_items - 1))])
    table = np.full((entries[-1] + P + 2, P), IDLE, np.int32)
    for item, entry in zip(order, entries, strict=True):
        for stage in range(P):
            table[entry + stage, stage] = item
    return table[::-1] if reverse else table


@pytest.mark.parametrize("make_table", [None, other_table], ids=["terapipe", "other table"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_every_item_passes_every_stage_once_in_the_order_of_the_table(
    plan: Plan, reverse: bool, make_table: Callable[[Plan, bool], np.ndarray] | None
) -> None:
    schedule = terapipe(plan)
    num_ticks = schedule.num_ticks // 2
    table = schedule.backward[num_ticks:] if reverse else schedule.forward[:num_ticks]
    if make_table:
        table = make_table(plan, reverse)
    source = 1.0 + np.arange(plan.batch_size * plan.seq_len).reshape(plan.batch_size, -1, 1)
    results, diary = run_sweep(table, schedule.items, source, reverse)

    stages = range(plan.num_stages)
    expected = source
    for stage in reversed(stages) if reverse else stages:
        expected = 10 * expected + stage + 1
        np.testing.assert_array_equal(results[stage], expected)

    for stage in stages:
        due = [schedule.items[i] for i in table[:, stage] if i != IDLE]
        assert diary.count[stage] == len(due) == len(schedule.items)
        seen = diary.seen[stage][: len(due)].tolist()
        assert seen == [[item.row, item.token, item.num_tokens] for item in due]
