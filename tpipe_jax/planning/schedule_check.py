"""Checks that the executor can follow the tables of a schedule. No jax."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from tpipe_jax.planning.schedule import IDLE, Item, Schedule


def check(schedule: Schedule) -> None:
    """Raises ValueError unless the executor can follow the tables.

    Every item passes every stage once in each direction, one tick after the neighbouring stage. A
    slice goes through the chunks one after another. The tokens of a sequence go forward in
    ascending and backward in descending order. Each part is embedded before its forward passes.
    Its losses are taken after its forward and before its backward passes, and the gradients of its
    embedding after its backward passes. Each of these three is done for at most one part in a tick.
    Gradients of weights come after the backward pass of their item. A row of the buffers holds one
    part at a time, and a slot holds one item.
    """
    part_of, P = np.array(schedule.part_of), schedule.num_stages
    if schedule.forward.shape != schedule.backward.shape:
        raise ValueError("the tables of both directions have different shapes")
    forward = _ticks(schedule.forward, len(schedule.items))
    backward = _ticks(schedule.backward, len(schedule.items))
    if not ((np.diff(forward) == 1).all() and (np.diff(backward) == -1).all()):
        raise ValueError("an item does not come one tick after its neighbour")
    for i, item in enumerate(schedule.items):
        part = schedule.parts[part_of[i]]
        if not part.embed_tick <= forward[i, 0] <= forward[i, P - 1] <= part.loss_tick:
            raise ValueError(
                f"item {i} goes forward before its part is embedded, or after its losses"
            )
        if not part.loss_tick <= backward[i, P - 1] <= backward[i, 0] <= part.embed_grad_tick:
            raise ValueError(
                f"item {i} goes backward before the losses of its part, or after the gradients of "
                "its embedding"
            )
        if item.row + item.num_rows > part.row + part.num_rows:
            raise ValueError(f"item {i} is of several parts")
    _check_order(schedule.items, forward, backward)
    if schedule.weights is not None:
        _check_weights(schedule, part_of, backward)
    _check_parts(schedule, part_of, backward)


def _check_order(items: Sequence[Item], forward: np.ndarray, backward: np.ndarray) -> None:
    """Takes the ticks of each item, `[item, stage]`."""
    in_order = sorted(
        range(len(items)), key=lambda i: (items[i].row, items[i].chunk, items[i].token)
    )
    for i, j in pairwise(in_order):
        is_same = (items[i].row, items[i].chunk) == (items[j].row, items[j].chunk)
        if is_same and not ((forward[i] < forward[j]) & (backward[i] > backward[j])).all():
            raise ValueError(f"item {j} does not follow item {i}")
    of_slice: dict[tuple[int, int], list[int]] = {}
    for i in in_order:
        of_slice.setdefault((items[i].row, items[i].token), []).append(i)
    for own in of_slice.values():
        for i, j in pairwise(own):
            if not (forward[i, -1] < forward[j, 0] and backward[j, 0] < backward[i, -1]):
                raise ValueError(f"item {j} enters before item {i} has gone through its chunk")


def _check_weights(schedule: Schedule, part_of: np.ndarray, backward: np.ndarray) -> None:
    """Takes the part of each item, and the ticks of its backward passes, `[item, stage]`."""
    assert schedule.weights is not None
    assert schedule.slots is not None
    weights = _ticks(schedule.weights, len(schedule.items))
    if not (weights >= backward).all():
        raise ValueError("gradients of weights are taken before their backward pass")
    last = np.array([part.last_tick for part in schedule.parts])[part_of]
    if not (weights <= last[:, None]).all():
        raise ValueError("gradients of weights are taken after their part has ended")
    for stage in range(schedule.num_stages):
        order = np.lexsort((backward[:, stage], schedule.slots[:, stage]))
        for i, j in pairwise(order.tolist()):
            is_same = schedule.slots[i, stage] == schedule.slots[j, stage]
            if is_same and backward[j, stage] <= weights[i, stage]:
                raise ValueError(f"items {i} and {j} are in a slot of stage {stage} at a time")


def _check_parts(schedule: Schedule, part_of: np.ndarray, backward: np.ndarray) -> None:
    """Takes the part of each item, and the ticks of its backward passes, `[item, stage]`."""
    for name in ("embed_tick", "loss_tick", "embed_grad_tick"):
        ticks = [getattr(part, name) for part in schedule.parts]
        if len(set(ticks)) < len(ticks):
            raise ValueError(f"{name} is the same tick for several parts")
    first, last = (
        np.array([of(backward[part_of == i], 0) for i in range(len(schedule.parts))])
        for of in (np.min, np.max)
    )
    for i, part in enumerate(schedule.parts):
        if part.last_tick < part.embed_grad_tick:
            raise ValueError(f"part {i} ends before the gradients of its embedding are taken")
        if part.buffer_row + part.num_rows > schedule.num_rows:
            raise ValueError(f"part {i} has no rows")
        if part.num_rows > schedule.num_gradient_rows:
            raise ValueError(f"part {i} has no rows for gradients")
        for j, other in enumerate(schedule.parts[:i]):
            is_shared = set(part.buffer_rows) & set(other.buffer_rows)
            is_apart = part.last_tick < other.embed_tick or other.last_tick < part.embed_tick
            if is_shared and not is_apart:
                raise ValueError(f"parts {j} and {i} have the same rows at a time")
            is_one_at_a_time = ((last[i] < first[j]) | (last[j] < first[i])).all()
            if schedule.num_gradient_rows < schedule.num_rows and not is_one_at_a_time:
                raise ValueError(f"parts {j} and {i} have the same gradients at a time")


def _ticks(table: np.ndarray, num_items: int) -> np.ndarray:
    """Returns `[item, stage]`: the tick of each item. Raises ValueError if it is not just one."""
    ticks = np.empty((num_items, table.shape[1]), np.int64)
    for stage, column in enumerate(np.moveaxis(table, 1, 0)):
        found = column != IDLE
        if sorted(column[found].tolist()) != list(range(num_items)):
            raise ValueError(f"stage {stage} does not have every item once")
        ticks[column[found], stage] = np.nonzero(found)[0]
    return ticks
