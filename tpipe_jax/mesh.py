"""The mesh of devices, and the sharding rules."""

import ctypes
import math
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tpipe_jax.block import Params
from tpipe_jax.config import GPT2, MeshConfig, ModelConfig, UserError
from tpipe_jax.gpt2_block import NORM_SPECS
from tpipe_jax.layer import block_class, heads, param_shapes

AXES = ("data", "pipe", "model")

# How the parameters are divided: the vocabulary over all stages and 'model', blocks over the stages
# and within each as `Block.specs` says. What names no axis is on all devices.
_OTHERS = {
    "embed": {"tokens": PartitionSpec(("pipe", "model")), "positions": PartitionSpec()},
    "norm": NORM_SPECS,
}


MAX_LAYERS = 10_000
MAX_CPU_DEVICES = 1024  # that a process makes; each has threads of its own


def find_devices(config: MeshConfig, num_processes: int = 1) -> list[jax.Device]:
    """The devices of all processes; on CPUs, as many as the mesh asks for.

    Call it before anything else of jax, which counts its devices only once. Raises `UserError` if
    CPU devices cannot be shared out evenly.
    """
    num_local, rest = divmod(config.num_devices, num_processes)
    prepare_cpu(num_local)
    jax.config.update("jax_num_cpu_devices", min(max(num_local, 1), MAX_CPU_DEVICES))
    devices = jax.devices()
    if rest and devices[0].platform == "cpu":
        raise UserError(
            f"{_product(config)} CPU devices cannot be shared out evenly among {num_processes} "
            "processes: start a number that divides them."
        )
    return devices


def prepare_cpu(num_devices: int) -> None:
    """Makes CPU devices of this process fast: flags of XLA, and freed memory is kept.

    Call it before anything else of jax. What each is worth is in docs/design.md; flags that the
    user has set come last and count. Other platforms ignore these.
    """
    flags = [
        # Sums by the compiler's own code; by the library for matrix products they are slower.
        "--xla_cpu_experimental_ynn_fusion_type=-reduce",
        # Buffers that are updated in place are analysed better, so fewer are copied.
        "--xla_cpu_copy_insertion_use_region_analysis=true",
    ]
    if num_devices >= len(os.sched_getaffinity(0)):  # no core to spare for threads in an operator
        flags.append("--xla_cpu_multi_thread_eigen=false")
    given = os.environ.get("XLA_FLAGS", "").split()
    os.environ["XLA_FLAGS"] = " ".join([*(f for f in flags if f not in given), *given])
    # glibc hands large buffers back to the system, and a step that gets them anew has all of their
    # pages to fault in.
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(ctypes.c_int(-4), ctypes.c_int(0))  # M_MMAP_MAX: no buffer of its own mapping
        libc.mallopt(ctypes.c_int(-1), ctypes.c_int(-1))  # M_TRIM_THRESHOLD: never shrink the heap


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Mesh of the axes data, pipe and model. Raises `UserError` if the devices don't fit."""
    if config.auto:
        raise UserError(
            "config.mesh.auto=True is for training and launch/plan.py, which measure: set "
            "config.mesh.data, pipe and model."
        )
    if len(devices) != config.num_devices:
        raise UserError(
            f"{_product(config)} devices, but there are {len(devices)} ({devices[0].device_kind}): "
            f"set the three so that their product is {len(devices)}, "
            "or run on CPU devices with the environment variable JAX_PLATFORMS=cpu."
        )
    return Mesh(place_devices(config, devices), AXES, axis_types=(AxisType.Auto,) * 3)


def place_devices(config: MeshConfig, devices: Sequence[Any]) -> np.ndarray:
    """The devices as `[data, pipe, model]`.

    Devices of a process, and processes of a slice (what a fast network joins), are neighbours along
    the last axes of config.order.
    """
    near = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0), d.process_index, d.id))
    grid = np.empty(len(near), object)
    grid[:] = near
    order = config.order.split(",")
    grid = grid.reshape([getattr(config, axis) for axis in order])
    return grid.transpose([order.index(axis) for axis in AXES])


def _product(config: MeshConfig) -> str:
    return (
        f"config.mesh.data={config.data} * pipe={config.pipe} * model={config.model} asks for "
        f"{config.num_devices}"
    )


class HostPart(NamedTuple):
    """What one host has of the mesh."""

    host: str
    processes: list[int]
    num_devices: int
    stages: list[int]
    data_shards: list[int]


def host_parts(mesh: Mesh, hosts: Sequence[str]) -> list[HostPart]:
    """What each host has of the mesh; `hosts` are the names by process."""
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
    """Whether some operators are shared by devices of several hosts, over the slower network."""
    names = np.vectorize(lambda device: hosts[device.process_index], otypes=[object])(mesh.devices)
    return bool((names != names[..., :1]).any())


def compute_capability(device: Any) -> tuple[int, int] | None:
    """CUDA's, as (8, 0); None for other devices."""
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def oldest_device(mesh: Mesh) -> Any:
    """The one of least compute capability, which is what all of a mesh can do."""
    return min(mesh.devices.flat, key=lambda device: compute_capability(device) or (0, 0))


def check_model(config: ModelConfig, mesh: MeshConfig) -> None:
    """Raises `UserError` where 'model' does not divide the operators, for too many layers, and for
    a block that does not do.
    """
    if config.num_layers > MAX_LAYERS:
        raise UserError(
            f"config.model.num_layers={config.num_layers} is more than the {MAX_LAYERS} that can "
            "be compiled, each as a part of the program: give fewer."
        )
    if config.block == GPT2:
        divided = {"config.model.num_heads": config.num_heads, "config.model.d_ff": config.ff_width}
    else:
        divided = {f"the keys' heads of config.model.block={config.block},": heads(config).num_keys}
    for name, value in divided.items():
        if value % mesh.model:
            sign = "=" if config.block == GPT2 else " "
            raise UserError(
                f"config.mesh.model={mesh.model} does not divide {name}{sign}{value}: "
                "pick a divisor."
            )


def padded_vocab_size(config: ModelConfig, mesh: Mesh) -> int:
    """Rows of the token embedding on the mesh: as many on each device of 'pipe' and 'model'.

    They are aligned for products on GPUs, which take several times as long for logits of 50257
    tokens as for 50304 (docs/gpu.md).
    """
    parts = mesh.shape["pipe"] * mesh.shape["model"]
    num_rows = -(-config.vocab_size // parts)
    multiple = 128 if num_rows > 32 * 128 else 8
    return -(-num_rows // multiple) * multiple * parts


def param_specs(config: ModelConfig, num_blocks: int) -> Params:
    """Where the parameters lie on the mesh, as a tree of their structure.

    Block n of the tree stacks the nth block of every stage, `[P, ...]`, zeros where a stage has no
    nth block: an array for each layer of a stage rather than one for all, since a slice of a stack
    may be copied for each use. The token embedding has `padded_vocab_size` rows.
    """
    specs = block_class(config).specs
    if specs is None:
        specs = jax.tree.map(lambda _: PartitionSpec(), param_shapes(config))
    block = jax.tree.map(lambda spec: PartitionSpec("pipe", *spec), specs, is_leaf=_is_spec)
    return _OTHERS | {"blocks": [block] * num_blocks}


def over_data(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """The spec with 'data' added to an axis that it divides, for ZeRO (Rajbhandari et al. 2020);
    the same where there is none. Axes that are not divided yet come first.
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
    """The specs without 'model', which `shard_map` leaves to GSPMD."""

    def keep(axis: Any) -> Any:
        kept = tuple(
            a for a in (axis if isinstance(axis, tuple) else (axis,)) if a not in (None, "model")
        )
        return kept[0] if len(kept) == 1 else kept or None

    return jax.tree.map(lambda spec: PartitionSpec(*map(keep, spec)), specs, is_leaf=_is_spec)


def shardings(mesh: Mesh, specs: Any) -> Any:
    """NamedShardings for a tree of specs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def put_rows(mesh: Mesh, rows: np.ndarray) -> Array:
    """Puts rows that every process has on the mesh, `[B, ...]`, sharded over 'data'."""
    return put_read_rows(mesh, lambda wanted: rows[wanted], rows.shape, rows.dtype)


def put_read_rows(
    mesh: Mesh, read: Callable[[slice], np.ndarray], shape: tuple[int, ...], dtype: Any
) -> Array:
    """As `put_rows`, but each process reads the rows of its own data shards only, once."""
    parts: dict[tuple[int, int, int], np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        wanted = index[0].indices(shape[0])
        if wanted not in parts:
            parts[wanted] = read(slice(*wanted))
        return parts[wanted]

    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.make_array_from_callback(shape, sharding, part, dtype=dtype)


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)
