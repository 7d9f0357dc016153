"""Several arrays side by side in one, so that one kernel writes or adds all of them.

On a GPU a kernel for a slice's values takes some microseconds, however small they are, and a layer
has a dozen such values. Where 'model' divides values they stay apart: what lies side by side would
not be divided evenly.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from tpipe_jax.model.block import Params


class Packing(NamedTuple):
    """Which values of a layer share an array, with the width of each."""

    groups: tuple[Mapping[str, int], ...]

    @classmethod
    def of(cls, widths: Mapping[str, int], is_joined: bool) -> "Packing":
        """All in one array, or each in its own."""
        return cls((widths,) if is_joined else tuple({n: w} for n, w in widths.items()))

    @property
    def widths(self) -> dict[str, int]:
        """The width of each value."""
        return {name: width for group in self.groups for name, width in group.items()}

    @property
    def shapes(self) -> dict[str, int]:
        """The width of each array, by name."""
        return {_name(group): sum(group.values()) for group in self.groups}

    def pack(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the arrays, `[..., width]`, from the values."""
        return {_name(group): _joined([values[name] for name in group]) for group in self.groups}

    def unpack(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The inverse of `pack`; arrays of other names are returned as they are."""
        found = {**arrays}
        for group in self.groups:
            found |= _parts(found.pop(_name(group)), group)
        return found


NOTHING = Packing(())


def _name(group: Mapping[str, int]) -> str:
    return "+".join(group)


def _joined(values: Sequence[Array]) -> Array:
    return values[0] if len(values) == 1 else jnp.concatenate(values, -1)


def _parts(array: Array, widths: Mapping[str, int]) -> dict[str, Array]:
    found, first = {}, 0
    for name, width in widths.items():
        found[name] = lax.slice_in_dim(array, first, first + width, axis=array.ndim - 1)
        first += width
    return found


class JoinedBiases(NamedTuple):
    """Gradients of a block's parameters, with those of all biases of linear layers in one array."""

    biases: Array
    """Side by side, in the order of `Block.linears`."""
    params: Params
    """The others, a tree without these biases."""


def join_biases(linears: Mapping[str, Any], params: Params) -> JoinedBiases:
    """Joins the biases of linear layers, of which there is one at least."""
    kept = {
        name: {kind: a for kind, a in layer.items() if kind != "bias"} if name in linears else layer
        for name, layer in params.items()
    }
    biases = [params[name]["bias"] for name in _with_bias(linears, params)]
    return JoinedBiases(jnp.concatenate(biases), kept)


def split_biases(linears: Mapping[str, Any], joined: JoinedBiases, like: Params) -> Params:
    """The inverse of `join_biases`, for a tree with the shapes of `like`."""
    widths = {name: len(like[name]["bias"]) for name in _with_bias(linears, like)}
    biases = _parts(joined.biases, widths)
    return {
        name: layer | {"bias": biases[name]} if name in biases else layer
        for name, layer in joined.params.items()
    }


def sum_of_outputs(
    linears: Mapping[str, tuple[str, str]], params: Params, d_outputs: Mapping[str, Array]
) -> Array:
    """Returns the gradients of the biases, as `join_biases` has them: the gradients with respect to
    the layers' outputs `[B, L, width]`, summed over tokens in float32 by one kernel.
    """
    targets = [linears[name][1] for name in _with_bias(linears, params)]
    joined = jnp.concatenate([d_outputs[target] for target in targets], -1)
    return joined.astype(jnp.float32).sum((0, 1))


def _with_bias(linears: Mapping[str, Any], params: Params) -> list[str]:
    return [name for name in linears if "bias" in params[name]]
