"""What the settings leave open until the devices are known."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from tpipe_jax.attention.backends import resolve_attention
from tpipe_jax.config.settings import Config, resolved
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.devices.precision import resolve_precision
from tpipe_jax.model.functional import heads
from tpipe_jax.model.sharding import check_model


def on_devices(config: Config, devices: Sequence[jax.Device]) -> tuple[Config, Mesh]:
    """The config as `on_mesh` has it, and the mesh. Raises `UserError` if the devices do not fit
    the mesh, or the mesh the model.
    """
    mesh = make_mesh(config.mesh, devices)
    check_model(config.model, config.mesh)
    return on_mesh(config, mesh), mesh


def on_mesh(config: Config, mesh: Mesh) -> Config:
    """The config with everything filled in that depends on other settings or on the devices: number
    format and attention. Raises `UserError` if the devices cannot run the attention.
    """
    config = resolve_precision(resolved(config), mesh)
    return resolve_attention(config, mesh, heads(config.model))
