"""What the measurements of a profile depend on."""

import os
import platform
from typing import Any

import jax
from jax.sharding import Mesh

from tpipe_jax.attention.backends import attention_backend
from tpipe_jax.config.settings import Config, to_dict
from tpipe_jax.devices.precision import compute_format
from tpipe_jax.model.functional import heads
from tpipe_jax.model.registry import block_digest
from tpipe_jax.model.remat import saved_names
from tpipe_jax.planning.settings import unit_tokens
from tpipe_jax.version import __version__


def profile_key(config: Config, mesh: Mesh) -> dict[str, Any]:
    """What the measurements depend on."""
    settings = to_dict(config)
    return {
        "model": settings["model"],
        "block": block_digest(config.model),
        "mesh": {name: settings["mesh"][name] for name in ("data", "pipe", "model", "order")},
        "batch_size": config.train.batch_size,
        "precision": compute_format(config.precision, mesh),
        "attention": [attention_backend(config, mesh, heads(config.model)), config.attention.block],
        "saved": list(saved_names(config.memory.remat)),
        "defer_weight_grads": config.memory.defer_weight_grads,
        "shard_state": config.optim.shard_state,
        "unit_tokens": unit_tokens(config),
        "devices": f"{mesh.devices.size} x {mesh.devices.flat[0].device_kind}",
        "processes": jax.process_count(),
        "cores": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "jax": jax.__version__,
        "tpipe_jax": __version__,
    }
