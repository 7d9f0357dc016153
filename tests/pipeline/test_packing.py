"""Arrays side by side, and apart again."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpipe_jax.pipeline.packing import (
    NOTHING,
    Packing,
    join_biases,
    split_biases,
    sum_of_outputs,
)

WIDTHS = {"x": 3, "hidden": 5, "q": 2}


@pytest.mark.parametrize("is_joined", [True, False])
def test_values_come_back_as_they_were(is_joined: bool):
    random = np.random.default_rng(0)
    values = {name: jnp.asarray(random.normal(size=(2, 4, w))) for name, w in WIDTHS.items()}
    packing = Packing.of(WIDTHS, is_joined)
    assert packing.widths == WIDTHS
    packed = packing.pack(values | {"other": jnp.zeros(1)})
    assert {name: a.shape[-1] for name, a in packed.items()} == packing.shapes
    assert len(packed) == (1 if is_joined else 3)
    found = packing.unpack(packed | {"lse": jnp.ones(7)})
    np.testing.assert_array_equal(found.pop("lse"), 1)
    jax.tree.map(np.testing.assert_array_equal, found, values)
    assert NOTHING.pack(values) == {}


LINEARS = {"b": ("b_in", "b_out"), "a": ("a_in", "a_out"), "c": ("c_in", "c_out")}


def params() -> Any:
    """The order of the layers is another one than that of `LINEARS`; one has no bias."""
    return {
        "a": {"kernel": jnp.full((2, 3), 1.0), "bias": jnp.full(3, 2.0)},
        "b": {"kernel": jnp.full((2, 4), 3.0), "bias": jnp.full(4, 4.0)},
        "c": {"kernel": jnp.full((2, 2), 5.0)},
        "norm": {"scale": jnp.full(2, 6.0), "bias": jnp.full(2, 7.0)},
    }


def test_biases_of_linear_layers_are_joined():
    joined = join_biases(LINEARS, params())
    np.testing.assert_array_equal(joined.biases, [4, 4, 4, 4, 2, 2, 2])
    assert joined.params["a"].keys() == joined.params["b"].keys() == {"kernel"}
    assert joined.params["norm"].keys() == {"scale", "bias"}
    found = split_biases(LINEARS, joined, params())
    jax.tree.map(np.testing.assert_array_equal, found, params())


def test_sums_of_outputs_are_gradients_of_biases_in_that_order():
    """In float32: bfloat16 would stand still at 256 ones."""
    d_outputs = {
        "a_out": jnp.ones((2, 300, 3), jnp.bfloat16),
        "b_out": jnp.full((2, 300, 4), 2, jnp.bfloat16),
        "c_out": jnp.full((2, 300, 2), jnp.nan, jnp.bfloat16),
    }
    found = sum_of_outputs(LINEARS, params(), d_outputs)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, [1200] * 4 + [600] * 3)
