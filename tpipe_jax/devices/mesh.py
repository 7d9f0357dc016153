"""The mesh of devices, and how arrays lie on it."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tpipe_jax.config.settings import MeshConfig
from tpipe_jax.errors import UserError

AXES = ("data", "pipe", "model")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Makes the mesh with the axes data, pipe and model. Raises `UserError` if the number of
    devices is not their product, or if config.mesh.auto is set.
    """
    if config.auto:
        raise UserError(
            "config.mesh.auto=True is for training and tpipe plan, which measure: set "
            "config.mesh.data, pipe and model."
        )
    if len(devices) != config.num_devices:
        remedy = "run on CPU devices with the environment variable JAX_PLATFORMS=cpu."
        if devices[0].platform == "cpu":
            remedy = (
                f"call jax.config.update('jax_num_cpu_devices', {config.num_devices}) before "
                "anything else uses jax, since its first use fixes their number."
            )
        raise UserError(
            f"{asked_product(config)} devices, but there are {len(devices)} "
            f"({devices[0].device_kind}): set the three so that their product is {len(devices)}, "
            f"or {remedy}"
        )
    return Mesh(place_devices(config, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def place_devices(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices as an array `[data, pipe, model]`.

    Devices of a process, and processes with the same `slice_index` in jax (joined by a fast
    network), are neighbours along the last axes of config.order.
    """
    near = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0), d.process_index, d.id))
    grid = np.empty(len(near), object)
    grid[:] = near
    order = config.order.split(",")
    grid = grid.reshape([getattr(config, axis) for axis in order])
    return grid.transpose([order.index(axis) for axis in AXES])


def asked_product(config: MeshConfig) -> str:
    """Says how many devices the settings ask for, as the beginning of a sentence."""
    return (
        f"config.mesh.data={config.data} * pipe={config.pipe} * model={config.model} asks for "
        f"{config.num_devices}"
    )


class HostPart(NamedTuple):
    """The part of the mesh that lies on one host."""

    host: str
    processes: list[int]
    num_devices: int
    stages: list[int]
    data_shards: list[int]


def host_parts(mesh: Mesh, hosts: Sequence[str]) -> list[HostPart]:
    """Returns the part of the mesh on each host; `hosts` has the host's name for each process."""
    places = [
        (hosts[device.process_index], device.process_index, pipe, data)
        for (data, pipe, _), device in np.ndenumerate(mesh.devices)
    ]
    parts = []
    for host in dict.fromkeys(host for host, *_ in places):
        own = [place for name, *place in places if name == host]
        processes, stages, shards = (sorted(set(numbers)) for numbers in zip(*own, strict=True))
        parts.append(HostPart(host, processes, len(own), stages, shards))
    return parts


def operators_span_hosts(mesh: Mesh, hosts: Sequence[str]) -> bool:
    """Whether devices of several hosts share an operator, and so use the slower network."""
    names = np.vectorize(lambda device: hosts[device.process_index], otypes=[object])(mesh.devices)
    return bool((names != names[..., :1]).any())


def over_data(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """Returns the spec with 'data' added to one axis, for ZeRO (Rajbhandari et al. 2020). It is the
    first axis that 'data' divides evenly, undivided axes first; if there is none, the spec is
    unchanged.
    """
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    names = [(axis,) if isinstance(axis, str) else axis or () for axis in axes]
    for n in sorted(range(len(axes)), key=lambda n: len(names[n])):
        divided = *names[n], "data"
        if shape[n] % math.prod(mesh.shape[name] for name in divided) == 0:
            axes[n] = divided if names[n] else "data"
            break
    return PartitionSpec(*axes)


def manual_part(specs: Any) -> Any:
    """Returns the specs without 'model', the axis that `shard_map` leaves to GSPMD."""

    def keep(axis: Any) -> Any:
        kept = tuple(
            a for a in (axis if isinstance(axis, tuple) else (axis,)) if a not in (None, "model")
        )
        return kept[0] if len(kept) == 1 else kept or None

    return jax.tree.map(lambda spec: PartitionSpec(*map(keep, spec)), specs, is_leaf=is_spec)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """Makes NamedShardings from a tree of specs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=is_spec)


def put_rows(mesh: Mesh, rows: np.ndarray) -> Array:
    """Puts rows `[B, ...]` on the mesh, sharded over 'data'. Every process has all rows."""
    return put_read_rows(mesh, lambda wanted: rows[wanted], rows.shape, rows.dtype)


def put_read_rows(
    mesh: Mesh, read: Callable[[slice], np.ndarray], shape: tuple[int, ...], dtype: Any
) -> Array:
    """As `put_rows`, but each process reads only the rows of its own data shards, once."""
    parts: dict[tuple[int, int, int], np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        wanted = index[0].indices(shape[0])
        if wanted not in parts:
            parts[wanted] = read(slice(*wanted))
        return parts[wanted]

    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.make_array_from_callback(shape, sharding, part, dtype=dtype)


def is_spec(value: Any) -> bool:
    """Whether a value is a leaf in a tree of `PartitionSpec`."""
    return isinstance(value, PartitionSpec)
