"""Chooses the attention of a run: what the settings ask for, if the devices can run it."""

from dataclasses import replace
from typing import get_args

from tpipe_jax.attention import flash
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
# whole sequences on an H200. One call of cuDNN for a context of up to 8192 keys was faster than
# calls for 1024 keys in a loop (docs/gpu.md). It skips keys that are not visible, in tiles.
XLA_BLOCK = 1024
CUDNN_GROUP = 8192
CUDNN_TILE = 128
# On GPUs, slices of sequences of at most so many tokens read them whole: a turn over the context
# starts a dozen kernels, and waits for the host before.
XLA_WHOLE = 4096
PREFERRED: tuple[Backend, ...] = ("flash", "cudnn", "xla")


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
    """Returns the name of the backend; `auto` becomes the first of `PREFERRED` that the devices
    run.
    """
    if config.attention.backend != "auto":
        return config.attention.backend
    return next(name for name in PREFERRED if not _obstacle(name, config, device, heads))


def make_attention(config: Config, device: DeviceFacts, are_heads_divided: bool) -> Attention:
    """Makes the attention that the config names, for code of one device. `are_heads_divided` says
    whether devices share the heads of a stage.
    """
    backend, block = config.attention.backend, config.attention.block
    if backend == "xla":
        default, seq_len = BLOCK if device.platform == "cpu" else XLA_BLOCK, config.model.seq_len
        if device.platform == "gpu" and not block and seq_len <= XLA_WHOLE:
            return blockwise(default, reads_whole=True)._replace(key_block=seq_len)
        return blockwise(block or default)
    if backend == "flash":
        attention = flash.flash(flash.flash_kernels(device.capability), config.model.window)
    else:
        attention = grouped(cudnn_kernel(), block or CUDNN_GROUP)
        attention = attention._replace(key_block=block or CUDNN_TILE)
    return over_heads(attention) if are_heads_divided else attention


def _obstacle(backend: Backend, config: Config, device: DeviceFacts, heads: Heads) -> str | None:
    """Returns why these devices cannot run the backend for this model; None if they can."""
    if backend == "xla":
        return None
    if backend == "tokamax":
        return "is not used, since its backward pass goes over all keys, whatever a slice sees"
    capability = device.capability
    if capability is None or capability < (8, 0):
        return f"needs GPUs of compute capability 8.0 (Ampere) or newer, which {device.kind} is not"
    if compute_format(config.precision, device) == "float32":
        return (
            "computes in float16 and bfloat16, not in config.precision.compute=float32, which may "
            "be changed"
        )
    if not config.data.cross_document_attention:
        return "does not know where documents begin, as cross_document_attention=false needs"
    if backend == "flash":
        return _obstacle_of_flash(config, capability, heads)
    if config.model.window is not None:
        return f"has no sliding window, as config.model.sliding_window={config.model.window} needs"
    return _obstacle_of_cudnn(config, device, capability, heads)


def _obstacle_of_flash(config: Config, capability: tuple[int, int], heads: Heads) -> str | None:
    if heads.width % 8 or heads.width > 256:
        return _width(heads, 256)
    if config.attention.block:
        return (
            "reads a context whole, so that config.attention.block="
            f"{config.attention.block} means nothing"
        )
    return flash.obstacle(capability)


def _obstacle_of_cudnn(
    config: Config, device: DeviceFacts, capability: tuple[int, int], heads: Heads
) -> str | None:
    num_queries, num_keys, width = heads
    if num_queries != num_keys:
        return f"is not tried where {num_queries} heads share the keys of {num_keys}"
    # Limits of the backward pass: "Support Matrix" in docs.nvidia.com/cudnn, "Attention".
    widest = 256 if capability[0] == 9 else 128
    if width % 8 or width > widest:
        return _width(heads, widest)
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


def _width(heads: Heads, widest: int) -> str:
    return (
        f"needs heads whose width is a multiple of 8 and at most {widest}, not "
        f"config.model.d_model / num_heads = {heads.width}"
    )


def _text(version: int) -> str:
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
