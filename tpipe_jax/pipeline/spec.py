"""The facts about the stages that all programs of a run share, derived once from settings and
devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tpipe_jax.attention.backends import make_attention, resolve_attention
from tpipe_jax.attention.base import Attention, Heads
from tpipe_jax.config.settings import Config, resolved
from tpipe_jax.devices.hardware import DeviceFacts, facts_of
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.devices.precision import resolve_precision
from tpipe_jax.devices.skips import Skips, skips_on
from tpipe_jax.errors import UserError
from tpipe_jax.model.functional import heads
from tpipe_jax.model.registry import block_class
from tpipe_jax.model.remat import saved_names
from tpipe_jax.model.sharding import check_model
from tpipe_jax.pipeline.buffers import WeightGrads
from tpipe_jax.planning.placement import chunk_counts


@dataclass(frozen=True, eq=False)
class StageSpec:
    """A description of the stages of this model on this mesh."""

    config: Config
    """The settings, with everything filled in that depends on other settings or on the devices."""
    mesh: Mesh
    device: DeviceFacts
    dtype: jnp.dtype
    """Format of matrix products and activations."""
    heads: Heads
    """Heads of attention. Where 'model' has more devices than there are heads of keys, each device
    has a copy of the one that it needs, and the copies are counted."""
    attention: Attention
    weight_grads: WeightGrads
    saved_names: tuple[str, ...]
    """Names of the values of a layer that are saved, and so not computed again."""

    def with_config(self, config: Config) -> "StageSpec":
        """Returns the spec of another config on the same devices."""
        return make_spec(config, self.mesh, self.device)

    @property
    def skips(self) -> Skips:
        """How its programs skip work."""
        return skips_on(self.device.platform)

    @property
    def joins_arrays(self) -> bool:
        """Whether arrays lie side by side, so that there are fewer kernels (`packing`): on GPUs,
        where 'model' does not divide values.
        """
        return self.device.platform == "gpu" and self.mesh.shape["model"] == 1

    @property
    def num_stages(self) -> int:
        return self.mesh.shape["pipe"]

    @property
    def num_chunks(self) -> int:
        """Chunks of each stage."""
        return self.config.plan.num_chunks

    @cached_property  # since settings that have not been checked may have very many chunks
    def chunk_layers(self) -> tuple[tuple[int, ...], ...]:
        """Layers of each chunk of each stage, `[chunk][stage]`."""
        num_layers = self.config.model.num_layers
        return tuple(map(tuple, chunk_counts(num_layers, self.num_stages, self.num_chunks)))

    @property
    def layers_per_stage(self) -> int:
        """Places for layers on each stage: for each chunk, the most layers of any stage."""
        return sum(map(max, self.chunk_layers))


def make_spec(config: Config, mesh: Mesh, device: DeviceFacts | None = None) -> StageSpec:
    """Makes the spec of a run on a mesh. The devices are asked for their facts, unless these are
    given. Raises `UserError` if the devices cannot run the attention that the config asks for.
    """
    device = device or facts_of(mesh)
    config = resolve_precision(resolved(config), device)
    if config.balance_weight and not block_class(config.model).router_logits:
        raise UserError(
            f"config.train.balance_weight={config.balance_weight:g} needs a router, and "
            f"config.model.block={config.model.block} has no router_logits: leave it out."
        )
    of_block = heads(config.model)
    of_block = of_block._replace(num_keys=max(of_block.num_keys, mesh.shape["model"]))
    config = resolve_attention(config, device, of_block)
    return StageSpec(
        config,
        mesh,
        device,
        jnp.dtype(config.precision.compute),
        of_block,
        make_attention(config, device, mesh.shape["model"] > 1),
        _weight_grads(config),
        saved_names(config.memory.remat),
    )


def spec_on_devices(
    config: Config, devices: Sequence[jax.Device], device: DeviceFacts | None = None
) -> StageSpec:
    """Makes the spec of a run on these devices. Raises `UserError` if the devices do not fit the
    mesh or the settings, or the mesh does not fit the model.
    """
    mesh = make_mesh(config.mesh, devices)
    check_model(config.model, config.mesh)
    spec = make_spec(config, mesh, device)
    if config.memory.offload and spec.device.platform != "gpu":
        raise UserError(
            f"config.memory.offload=true is for GPUs, and these devices are "
            f"{spec.device.platform.upper()}s: leave it out."
        )
    return spec


def _weight_grads(config: Config) -> WeightGrads:
    if config.plan.schedule == "1f1b-deferred":
        return "some ticks later"
    return "at the end" if config.memory.defer_weight_grads else "at once"
