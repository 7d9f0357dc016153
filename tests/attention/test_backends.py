"""Which attention runs where, and what is said where it cannot."""

from dataclasses import replace
from typing import Any

import pytest

from support import fake_flash
from tpipe_jax.attention import backends
from tpipe_jax.attention.base import HEADS_FIRST, TOKENS_FIRST, Attention, Heads
from tpipe_jax.config.settings import (
    AttentionConfig,
    Config,
    DataConfig,
    ModelConfig,
    PrecisionConfig,
)
from tpipe_jax.devices.hardware import DeviceFacts
from tpipe_jax.errors import UserError
from tpipe_jax.model.functional import heads


def gpu(major: int, minor: int, cudnn: int | None = 91002) -> DeviceFacts:
    return DeviceFacts("gpu", f"gpu {major}.{minor}", (major, minor), cudnn)


CPU, V100, A100, H100 = DeviceFacts("cpu", "cpu"), gpu(7, 0), gpu(8, 0), gpu(9, 0)


@pytest.fixture(autouse=True)
def without_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_flash.install(monkeypatch, None)


@pytest.fixture
def with_flash(without_flash: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_flash.install(monkeypatch)


def config(
    backend: Any,
    compute: Any = "auto",
    head_width: int = 64,
    block: int | None = None,
    seq_len: int = 8192,
) -> Config:
    return Config(
        ModelConfig(2, 2 * head_width, 2, seq_len=seq_len),
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


@pytest.mark.usefixtures("with_flash")
@pytest.mark.parametrize(
    ("device", "compute", "head_width", "expected"),
    [
        (CPU, "bfloat16", 64, "xla"),
        (DeviceFacts("gpu", "gfx942"), "auto", 64, "xla"),
        (V100, "auto", 64, "xla"),
        (A100, "auto", 64, "flash"),
        (A100, "float16", 256, "flash"),
        (A100, "float32", 64, "xla"),
        (A100, "auto", 264, "xla"),
        (A100, "auto", 60, "xla"),
        (gpu(8, 9, cudnn=None), "auto", 64, "flash"),
        (H100, "auto", 64, "flash"),
        (H100, "auto", 264, "xla"),
        (gpu(10, 0), "auto", 128, "cudnn"),
        (gpu(10, 0), "auto", 136, "xla"),
        (gpu(12, 0), "auto", 136, "flash"),
    ],
)
def test_auto_is_flash_where_it_is_installed_and_runs(
    device: DeviceFacts, compute: Any, head_width: int, expected: str
):
    resolved = resolve(config("auto", compute, head_width), device)
    assert resolved.attention.backend == expected
    assert resolve(resolved, device) == resolved


@pytest.mark.usefixtures("with_flash")
def test_auto_is_not_flash_where_the_settings_ask_for_more():
    """Blocks of a size are cuDNN's, and documents are XLA's."""
    assert resolve(config("auto", block=512), H100).attention.backend == "cudnn"
    apart = replace(config("auto"), data=DataConfig(cross_document_attention=False))
    assert resolve(apart, H100).attention.backend == "xla"


@pytest.mark.usefixtures("with_flash")
def test_shared_keys_are_for_flash_alone_among_kernels():
    shared = Heads(num_queries=4, num_keys=2, width=64)
    for device, expected in ((A100, "flash"), (gpu(10, 0), "xla")):
        resolved = backends.resolve_attention(config("auto"), device, shared)
        assert resolved.attention.backend == expected
    with pytest.raises(UserError, match=r"is not tried where 4 heads share the keys of 2: .*flash"):
        backends.resolve_attention(config("cudnn"), A100, shared)


@pytest.mark.parametrize(
    ("device", "asked", "sentence"),
    [
        (CPU, config("cudnn", "bfloat16"), "needs GPUs of compute capability 8.0"),
        (V100, config("cudnn"), "(Ampere) or newer, which gpu 7.0 is not: set auto, or one that"),
        (A100, config("cudnn", "float32"), "not in config.precision.compute=float32, which may be"),
        (A100, config("cudnn", block=63), "at least 64 tokens, not config.attention.block=63: set"),
        (A100, config("cudnn", head_width=136), "at most 128, not config.model.d_model / num_head"),
        (A100, config("cudnn", head_width=60), "multiple of 8 and at most 128"),
        (CPU, config("tokamax"), "is not used, since its backward pass goes over all keys"),
    ],
)
def test_what_devices_cannot_run_is_refused(device: DeviceFacts, asked: Config, sentence: str):
    with pytest.raises(UserError) as error:
        resolve(asked, device)
    assert str(error.value).startswith(f"config.attention.backend={asked.attention.backend} ")
    assert sentence in str(error.value)
    assert str(error.value).endswith("can run here, xla.")


@pytest.mark.usefixtures("with_flash")
@pytest.mark.parametrize(
    ("device", "asked", "sentence", "usable"),
    [
        (CPU, config("flash", "bfloat16"), "needs GPUs of compute capability 8.0", "xla"),
        (V100, config("flash"), "(Ampere) or newer, which gpu 7.0 is not: set auto, or", "xla"),
        (A100, config("flash", "float32"), "not in config.precision.compute=float32, which", "xla"),
        (A100, config("flash", head_width=60), "multiple of 8 and at most 256", "xla"),
        (
            A100,
            config("flash", head_width=264),
            "at most 256, not config.model.d_model / num_heads = 264: set auto",
            "xla",
        ),
        (A100, config("flash", block=64), "config.attention.block=64 means noth", "xla, cudnn"),
        (
            A100,
            replace(config("flash"), data=DataConfig(cross_document_attention=False)),
            "does not know where documents begin, as cross_document_attention=false needs",
            "xla",
        ),
        (gpu(10, 0), config("flash"), "capability 8, 9 and 12 alone: set", "xla, cudnn"),
        (H100, config("cudnn", block=63), "at least 64 tokens, not config.attention.", "xla"),
        (A100, config("cudnn", head_width=136), "at most 128, not config.model.d_", "xla, flash"),
    ],
)
def test_what_devices_with_flash_cannot_run_is_refused(
    device: DeviceFacts, asked: Config, sentence: str, usable: str
):
    with pytest.raises(UserError) as error:
        resolve(asked, device)
    assert str(error.value).startswith(f"config.attention.backend={asked.attention.backend} ")
    assert sentence in str(error.value)
    assert str(error.value).endswith(f"can run here, {usable}.")


def test_flash_says_how_to_install_it():
    with pytest.raises(UserError, match=r'pip install "tpipe_jax\[flash12\]", .* xla, cudnn\.$'):
        resolve(config("flash"), A100)


def test_what_can_run_is_said():
    with pytest.raises(UserError, match=r"can run here, xla, cudnn\.$"):
        resolve(config("tokamax"), A100)


@pytest.mark.usefixtures("with_flash")
def test_what_can_run_is_said_with_flash():
    with pytest.raises(UserError, match=r"can run here, xla, cudnn, flash\.$"):
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
    assert make(config("xla"), DeviceFacts("tpu", "tpu")).key_block == 1024
    for block, group, steps in ((None, 8192, 128), (100, 100, 100)):
        attention: Any = make(config("auto", block=block), A100)
        assert (attention.forward.__self__.group, attention.key_block) == (group, steps)


def test_short_sequences_are_read_whole_on_gpus():
    for seq_len, expected in ((300, 300), (4096, 4096), (4097, 1024)):
        assert make(config("xla", seq_len=seq_len), V100).key_block == expected
    assert make(config("xla", seq_len=300, block=96), V100).key_block == 96
    for device, expected in ((CPU, 128), (DeviceFacts("tpu", "tpu"), 1024)):
        assert make(config("xla", seq_len=4096), device).key_block == expected


@pytest.mark.usefixtures("with_flash")
def test_flash_reads_in_tiles():
    assert make(config("auto"), H100).key_block == 128


@pytest.mark.usefixtures("with_flash")
def test_caches_are_in_the_order_of_the_attention():
    backends: dict[Any, Any] = {"xla": HEADS_FIRST, "cudnn": TOKENS_FIRST, "flash": TOKENS_FIRST}
    for backend, layout in backends.items():
        assert make(config(backend), H100).layout == layout
