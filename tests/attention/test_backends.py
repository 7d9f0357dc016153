"""Which attention runs where, and what is said where it cannot."""

from typing import Any

import pytest

from tpipe_jax.attention import backends
from tpipe_jax.attention.base import Attention
from tpipe_jax.config.settings import AttentionConfig, Config, ModelConfig, PrecisionConfig
from tpipe_jax.devices.hardware import DeviceFacts
from tpipe_jax.errors import UserError
from tpipe_jax.model.functional import heads


def gpu(major: int, minor: int, cudnn: int | None = 91002) -> DeviceFacts:
    return DeviceFacts("gpu", f"gpu {major}.{minor}", (major, minor), cudnn)


CPU, V100, A100, H100 = DeviceFacts("cpu", "cpu"), gpu(7, 0), gpu(8, 0), gpu(9, 0)


def config(
    backend: Any, compute: Any = "auto", head_width: int = 64, block: int | None = None
) -> Config:
    return Config(
        ModelConfig(2, 2 * head_width, 2, seq_len=4096),
        precision=PrecisionConfig(compute),
        attention=AttentionConfig(backend, block),
    )


def resolve(asked: Config, device: DeviceFacts) -> Config:
    return backends.resolve_attention(asked, device, heads(asked.model))


def make(asked: Config, device: DeviceFacts) -> Attention:
    return backends.make_attention(resolve(asked, device), device, False)


@pytest.mark.parametrize(
    ("device", "compute", "head_width", "expected"),
    [
        (CPU, "auto", 64, "xla"),
        (DeviceFacts("tpu", "tpu"), "auto", 64, "xla"),
        (DeviceFacts("gpu", "gfx942"), "auto", 64, "xla"),  # no NVIDIA GPU
        (V100, "auto", 64, "xla"),
        (A100, "auto", 64, "cudnn"),
        (A100, "float16", 128, "cudnn"),
        (A100, "float32", 64, "xla"),
        (A100, "auto", 136, "xla"),
        (A100, "auto", 60, "xla"),
        (H100, "auto", 136, "cudnn"),
        (H100, "auto", 264, "xla"),
        (gpu(10, 0), "auto", 128, "cudnn"),
        (gpu(10, 0), "auto", 136, "xla"),
        (gpu(12, 0), "auto", 136, "xla"),
    ],
)
def test_auto_is_cudnn_where_it_runs(
    device: DeviceFacts, compute: Any, head_width: int, expected: str
):
    resolved = resolve(config("auto", compute, head_width), device)
    assert resolved.attention.backend == expected
    assert resolve(resolved, device) == resolved


@pytest.mark.parametrize(
    ("device", "asked", "sentence"),
    [
        (CPU, config("cudnn", "bfloat16"), "needs GPUs of compute capability 8.0"),
        (V100, config("cudnn"), "(Ampere) or newer, which gpu 7.0 is not: set auto, or one that"),
        (A100, config("cudnn", "float32"), "not in config.precision.compute=float32, which may be"),
        (A100, config("cudnn", block=63), "at least 64 tokens, not config.attention.block=63: set"),
        (A100, config("cudnn", head_width=136), "at most 128, not config.model.d_model / num_head"),
        (A100, config("cudnn", head_width=60), "multiple of 8 and at most 128"),
        (CPU, config("tokamax"), "cannot be installed, since tokamax (0.0.12) needs typeguard"),
    ],
)
def test_what_devices_cannot_run_is_refused(device: DeviceFacts, asked: Config, sentence: str):
    with pytest.raises(UserError) as error:
        resolve(asked, device)
    assert str(error.value).startswith(f"config.attention.backend={asked.attention.backend} ")
    assert sentence in str(error.value)
    assert str(error.value).endswith("can run here, xla.")


def test_what_can_run_is_said():
    with pytest.raises(UserError, match=r"can run here, xla, cudnn\.$"):
        resolve(config("tokamax"), A100)


@pytest.mark.parametrize(
    ("version", "capability", "sentence"),
    [
        (None, (8, 0), "finds no cuDNN"),
        (91001, (8, 0), r"needs cuDNN 9\.10\.2 or newer, which 9\.10\.1 is not"),
        (91002, (10, 3), r"needs cuDNN 9\.11\.0 or newer, which 9\.10\.2 is not"),
        (91100, (10, 3), None),
    ],
)
def test_versions_of_cudnn(version: int | None, capability: tuple[int, int], sentence: str | None):
    device = gpu(*capability, cudnn=version)
    expected = "xla" if sentence else "cudnn"
    assert resolve(config("auto"), device).attention.backend == expected
    if sentence:
        with pytest.raises(UserError, match=sentence):
            resolve(config("cudnn"), device)


def test_blocks_are_as_set():
    sizes = {
        make(config("xla", block=block), device).key_block
        for block in (None, 96)
        for device in (CPU, V100)
    }
    assert sizes == {128, 1024, 96}
    assert make(config("auto"), A100).key_block == 1024
    assert make(config("auto", block=100), A100).key_block == 100
