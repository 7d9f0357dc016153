"""What the measurements of a profile depend on."""

import os
import platform
from typing import Any

import jax

from tpipe_jax.config.settings import to_dict
from tpipe_jax.config.user_code import block_digest
from tpipe_jax.pipeline.spec import StageSpec
from tpipe_jax.planning.settings import unit_tokens
from tpipe_jax.version import __version__


def profile_key(spec: StageSpec) -> dict[str, Any]:
    """Returns all that the measurements depend on."""
    config, mesh, attention = spec.config, spec.mesh, spec.config.attention
    settings = to_dict(config)
    return {
        "model": settings["model"],
        "block": block_digest(config.model),
        "mesh": {name: settings["mesh"][name] for name in ("data", "pipe", "model", "order")},
        "batch_size": config.train.batch_size,
        "precision": config.precision.compute,
        "attention": [attention.backend, attention.block, spec.attention.key_block],
        "saved": list(spec.saved_names),
        "offload": config.memory.offload,
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
