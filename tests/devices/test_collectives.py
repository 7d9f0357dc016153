"""Exchanges between stages whose devices share operators: each exchanges a part."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tpipe_jax.config.settings import MeshConfig
from tpipe_jax.devices.collectives import from_stage, handed_on, sum_over_stages
from tpipe_jax.devices.mesh import make_mesh

P, M = 2, 2
VALUES = np.random.default_rng(0).normal(size=(P, 3, 5, 8)).astype(np.float32)


def over_stages(local, values: np.ndarray = VALUES):
    """Returns a compiled program and its results `[stage, ...]`. Devices that share operators have
    the same value.
    """
    mesh = make_mesh(MeshConfig(1, P, M), jax.devices()[: P * M])
    mapped = jax.shard_map(
        lambda v: local(v[0])[None],
        mesh=mesh,
        axis_names={"data", "pipe"},
        in_specs=PartitionSpec("pipe"),
        out_specs=PartitionSpec("pipe"),
        check_vma=False,
    )
    compiled = jax.jit(mapped).lower(jnp.asarray(values)).compile()
    return compiled.as_text(), np.asarray(compiled(values))


@pytest.mark.parametrize("shape", [(3, 5, 8), (1, 1, 2), (3, 5, 7), (4, 6), (1, 3, 4, 2)])
def test_a_neighbour_gets_all_of_it(shape: tuple[int, ...]):
    """Also where the elements cannot be divided."""
    values = np.random.default_rng(1).normal(size=(P, *shape)).astype(np.float32)
    _, found = over_stages(lambda v: handed_on(v, [(0, 1)]), values)
    assert (found[0] == 0).all()
    assert (found[1] == values[0]).all()


def test_stages_sum_in_float32():
    _, found = over_stages(lambda v: sum_over_stages(v.astype(jnp.bfloat16)).astype(jnp.float32))
    rounded = VALUES.astype(jnp.bfloat16).astype(np.float32)
    expected = (rounded[0] + rounded[1]).astype(jnp.bfloat16).astype(np.float32)
    assert (found == expected).all()


def test_all_stages_get_the_value_of_one():
    _, found = over_stages(lambda v: from_stage(-1, v))
    assert (found == VALUES[1]).all()


@pytest.mark.parametrize(
    ("exchange", "operation"),
    [
        (lambda v: handed_on(v, [(0, 1)]), "collective-permute"),
        (sum_over_stages, "all-reduce"),
    ],
)
def test_each_device_exchanges_its_part(exchange, operation: str):
    """And all of a value that has a number for each token."""
    for values, num_exchanged in ((VALUES, 3 * 5 * 8 // M), (VALUES[..., 0], 3 * 5)):
        text, _ = over_stages(exchange, values)
        lines = [line for line in text.splitlines() if f" {operation}(" in line]
        [dims] = [re.findall(r"f32\[([\d,]*)\]", line)[0] for line in lines]
        assert np.prod([int(d) for d in dims.split(",")]) == num_exchanged
