"""The mesh of devices, the sharding rules, and which stage has which layer."""

import ctypes
import os
import platform
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tpipe_jax.config import MeshConfig, ModelConfig, UserError
from tpipe_jax.model import Params

AXES = ("data", "pipe", "model")

# How operator partitioning divides the parameters of a block over 'model': by attention heads and
# by feed-forward width (Megatron-LM). The same tree as a block's parameters; without 'model' in its
# entry a parameter is on all devices.
_WHOLE = PartitionSpec()
_NORM = {"scale": _WHOLE, "bias": _WHOLE}
BLOCK_SPECS = {
    "norm_1": _NORM,
    "attn_in": {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")},
    "attn_out": {"kernel": PartitionSpec("model"), "bias": _WHOLE},
    "norm_2": _NORM,
    "ff_in": {"kernel": PartitionSpec(None, "model"), "bias": PartitionSpec("model")},
    "ff_out": {"kernel": PartitionSpec("model"), "bias": _WHOLE},
}
EMBED_SPECS = {"tokens": PartitionSpec(("pipe", "model")), "positions": _WHOLE}


def find_devices(config: MeshConfig) -> list[jax.Device]:
    """All devices; on a CPU, as many as the mesh asks for.

    Call it before anything else of jax, which counts its devices only once. Devices that have no
    core to spare run faster without threads inside their operators.
    """
    if config.num_devices >= (os.cpu_count() or 1):
        no_threads = "--xla_cpu_multi_thread_eigen=false"
        os.environ["XLA_FLAGS"] = f"{no_threads} {os.environ.get('XLA_FLAGS', '')}"
    keep_freed_memory()
    jax.config.update("jax_num_cpu_devices", config.num_devices)
    return jax.devices()


def keep_freed_memory() -> None:
    """Has the C library keep what it frees, for CPU devices.

    glibc hands large buffers back to the system, and a step that gets them anew has all of their
    pages to fault in: a fifth of the quick start's time (docs/design.md).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(ctypes.c_int(-4), ctypes.c_int(0))  # M_MMAP_MAX: no buffer of its own mapping
        libc.mallopt(ctypes.c_int(-1), ctypes.c_int(-1))  # M_TRIM_THRESHOLD: never shrink the heap


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device]) -> Mesh:
    """Mesh of the axes data, pipe and model. Raises `UserError` if the devices don't fit."""
    if len(devices) != config.num_devices:
        raise UserError(
            f"config.mesh.data={config.data} * pipe={config.pipe} * model={config.model} asks for "
            f"{config.num_devices} devices, but there are {len(devices)} "
            f"({devices[0].device_kind}): "
            f"set the three so that their product is {len(devices)}, "
            "or run on CPU devices with the environment variable JAX_PLATFORMS=cpu."
        )
    shape = config.data, config.pipe, config.model
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_model(config: ModelConfig, mesh: MeshConfig) -> None:
    """Raises `UserError` where 'model' does not divide the operators."""
    for name, value in (("num_heads", config.num_heads), ("d_ff", config.ff_width)):
        if value % mesh.model:
            raise UserError(
                f"config.mesh.model={mesh.model} does not divide config.model.{name}={value}: "
                "pick a divisor."
            )


def layer_counts(num_layers: int, num_stages: int) -> list[int]:
    """Layers of each stage, as even as they go; earlier stages have one more."""
    return [num_layers // num_stages + (s < num_layers % num_stages) for s in range(num_stages)]


def to_stages(params: Params, mesh: Mesh) -> Params:
    """The model's parameters as the mesh holds them.

    Block n of the result stacks the nth block of every stage, `[P, ...]`, zeros where a stage has
    no nth block: an array for each layer of a stage rather than one for all, since a slice of a
    stack may be copied for each use. The vocabulary is padded to a multiple of P times the size
    of 'model'.
    """
    num_stages = mesh.shape["pipe"]
    blocks, counts = params["blocks"], layer_counts(len(params["blocks"]), num_stages)
    start = np.cumsum([0, *counts])
    padding = jax.tree.map(jnp.zeros_like, blocks[0])
    slots = [
        [blocks[start[s] + n] if n < counts[s] else padding for s in range(num_stages)]
        for n in range(counts[0])
    ]
    table_VD = params["embed"]["tokens"]
    fill = -table_VD.shape[0] % (num_stages * mesh.shape["model"])
    return params | {
        "embed": params["embed"] | {"tokens": jnp.pad(table_VD, ((0, fill), (0, 0)))},
        "blocks": [jax.tree.map(lambda *stages: jnp.stack(stages), *slot) for slot in slots],
    }


def param_specs(num_blocks: int) -> Params:
    """Where the result of `to_stages` lies, as a tree of the same structure."""
    block = jax.tree.map(lambda spec: PartitionSpec("pipe", *spec), BLOCK_SPECS, is_leaf=_is_spec)
    return {"embed": EMBED_SPECS, "blocks": [block] * num_blocks, "norm": _NORM}


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
    """Puts the batch on the mesh, `[B of all shards, T + 1]`, sharded over 'data'."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.make_array_from_callback(
        rows.shape, sharding, lambda index: rows[index], dtype=rows.dtype
    )


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)
