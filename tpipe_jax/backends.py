"""Which attention a run uses: what the settings ask for and the devices can do."""

from dataclasses import replace
from typing import Literal

from jax.sharding import Mesh

from tpipe_jax.attention import Attention, blockwise
from tpipe_jax.config import Config, UserError
from tpipe_jax.fused import cudnn_kernel, cudnn_version, grouped, over_heads
from tpipe_jax.mesh import compute_capability
from tpipe_jax.precision import compute_format

Backend = Literal["xla", "cudnn", "tokamax"]

# Keys that are read together, by platform. On a CPU, 64 to 512 have been timed
# (bench/attention.py); on GPUs and TPUs none yet (docs/gpu.md).
XLA_BLOCKS = {"cpu": 128}
XLA_BLOCK = 512
CUDNN_GROUP = 2048


def resolve_attention(config: Config, mesh: Mesh) -> Config:
    """The config with `attention.backend` as it is on these devices.

    Raises `UserError` if they cannot run it.
    """
    backend = attention_backend(config, mesh)
    if obstacle := _obstacle(backend, config, mesh):
        names: tuple[Backend, ...] = ("xla", "cudnn", "tokamax")
        usable = [name for name in names if not _obstacle(name, config, mesh)]
        raise UserError(
            f"config.attention.backend={backend} {obstacle}: set auto, or one that can run here, "
            f"{', '.join(usable)}."
        )
    return replace(config, attention=replace(config.attention, backend=backend))


def attention_backend(config: Config, mesh: Mesh) -> Backend:
    """The name of the backend, `auto` resolved for the devices: cuDNN where it runs, else XLA."""
    if config.attention.backend != "auto":
        return config.attention.backend
    return "xla" if _obstacle("cudnn", config, mesh) else "cudnn"


def make_attention(config: Config, mesh: Mesh) -> Attention:
    """The attention of the config, for code of one device in `train_step`."""
    block = config.attention.block
    if attention_backend(config, mesh) == "cudnn":
        attention = grouped(cudnn_kernel(), block or CUDNN_GROUP)
        return over_heads(attention) if mesh.shape["model"] > 1 else attention
    platform = mesh.devices.flat[0].platform
    return blockwise(min(block or XLA_BLOCKS.get(platform, XLA_BLOCK), config.model.seq_len))


def _obstacle(backend: Backend, config: Config, mesh: Mesh) -> str | None:
    """Why these devices cannot run the backend for this model."""
    if backend == "xla":
        return None
    if backend == "tokamax":
        return (
            "cannot be installed, since tokamax (0.0.12) needs typeguard 2.13.3 and the command "
            "line (tyro) 4 or newer"
        )
    device, capability = mesh.devices.flat[0], compute_capability(mesh)
    if capability is None or capability < (8, 0):
        return (
            f"needs GPUs of compute capability 8.0 (Ampere) or newer, which {device.device_kind} "
            "is not"
        )
    if compute_format(config.precision, mesh) == "float32":
        return "computes in float16 and bfloat16, not in config.precision.compute=float32"
    widest = 128 if capability < (9, 0) else 256
    width = config.model.head_width
    if width % 8 or width > widest:
        return (
            f"needs heads whose width is a multiple of 8 and at most {widest}, not "
            f"config.model.d_model / num_heads = {width}"
        )
    return None if cudnn_version() else "finds no cuDNN, which comes with jax[cuda12] or [cuda13]"
