"""Chooses the attention of a run: what the settings ask for, if the devices can run it."""

from dataclasses import replace
from typing import get_args

from tpipe_jax.attention.base import Attention, Heads
from tpipe_jax.attention.blockwise import blockwise
from tpipe_jax.attention.cudnn import cudnn_kernel
from tpipe_jax.attention.fused import grouped, over_heads
from tpipe_jax.config.settings import Backend, Config
from tpipe_jax.devices.hardware import DeviceFacts
from tpipe_jax.devices.precision import compute_format
from tpipe_jax.errors import UserError
from tpipe_jax.planning.context_blocks import BLOCK

# Keys that are read together on GPUs and TPUs. XLA_BLOCK was the fastest of 256, 512 and 1024 for
# whole sequences on an H200; CUDNN_GROUP is a guess (docs/gpu.md).
XLA_BLOCK = 1024
CUDNN_GROUP = 1024


def resolve_attention(config: Config, device: DeviceFacts, heads: Heads) -> Config:
    """Returns the config with `attention.backend` resolved for these devices.

    Raises `UserError` if the devices cannot run the backend.
    """
    backend = attention_backend(config, device, heads)
    if obstacle := _obstacle(backend, config, device, heads):
        names: tuple[Backend, ...] = get_args(Backend)
        usable = [
            name for name in names if name != "auto" and not _obstacle(name, config, device, heads)
        ]
        raise UserError(
            f"config.attention.backend={backend} {obstacle}: set auto, or one that can run here, "
            f"{', '.join(usable)}."
        )
    return replace(config, attention=replace(config.attention, backend=backend))


def attention_backend(config: Config, device: DeviceFacts, heads: Heads) -> Backend:
    """Returns the name of the backend; `auto` becomes cuDNN if the devices run it, else XLA."""
    if config.attention.backend != "auto":
        return config.attention.backend
    return "xla" if _obstacle("cudnn", config, device, heads) else "cudnn"


def make_attention(config: Config, device: DeviceFacts, are_heads_divided: bool) -> Attention:
    """Makes the attention that the config names, for code of one device. `are_heads_divided` says
    whether devices share the heads of a stage.
    """
    block = config.attention.block
    if config.attention.backend == "cudnn":
        attention = grouped(cudnn_kernel(), block or CUDNN_GROUP)
        return over_heads(attention) if are_heads_divided else attention
    default = BLOCK if device.platform == "cpu" else XLA_BLOCK
    return blockwise(block or default)


def _obstacle(backend: Backend, config: Config, device: DeviceFacts, heads: Heads) -> str | None:
    """Returns why these devices cannot run the backend for this model; None if they can."""
    if backend == "xla":
        return None
    if backend == "tokamax":
        return (
            "cannot be installed, since tokamax (0.0.12) needs typeguard 2.13.3 and the command "
            "line (tyro) 4 or newer"
        )
    capability = device.capability
    if capability is None or capability < (8, 0):
        return f"needs GPUs of compute capability 8.0 (Ampere) or newer, which {device.kind} is not"
    if compute_format(config.precision, device) == "float32":
        return (
            "computes in float16 and bfloat16, not in config.precision.compute=float32, which may "
            "be changed"
        )
    # Limits of the backward pass: "Support Matrix" in docs.nvidia.com/cudnn, "Attention".
    if not config.data.cross_document_attention:
        return "does not know where documents begin, as cross_document_attention=false needs"
    num_queries, num_keys, width = heads
    if num_queries != num_keys:
        return f"is not tried where {num_queries} heads share the keys of {num_keys}"
    widest = 256 if capability[0] == 9 else 128
    if width % 8 or width > widest:
        return (
            f"needs heads whose width is a multiple of 8 and at most {widest}, not "
            f"config.model.d_model / num_heads = {width}"
        )
    if device.cudnn is None:
        return "finds no cuDNN, which comes with jax[cuda12] and jax[cuda13]"
    # jax refuses older versions for capability 10.3; for others, cuDNN's own front end does.
    least = 91100 if capability == (10, 3) else 91002
    if device.cudnn < least:
        return f"needs cuDNN {_text(least)} or newer, which {_text(device.cudnn)} is not"
    block, fewest = config.attention.block, cudnn_kernel().min_tokens
    if block and block < fewest:
        return f"needs at least {fewest} tokens, not config.attention.block={block}"
    return None


def _text(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
