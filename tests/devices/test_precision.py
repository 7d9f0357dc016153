"""Which format the devices are fast in."""

import pytest

from tpipe_jax.config.settings import PrecisionConfig
from tpipe_jax.devices.hardware import DeviceFacts
from tpipe_jax.devices.precision import compute_format


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", None, "float32"),
        ("gpu", (7, 0), "float16"),
        ("gpu", (7, 5), "float16"),
        ("gpu", (8, 0), "bfloat16"),
        ("gpu", (9, 0), "bfloat16"),
        ("gpu", (12, 0), "bfloat16"),
        ("tpu", None, "bfloat16"),
    ],
)
def test_auto_is_what_the_device_is_fast_in(
    platform: str, capability: tuple[int, int] | None, expected: str
):
    device = DeviceFacts(platform, platform, capability)
    assert compute_format(PrecisionConfig(), device) == expected
    assert compute_format(PrecisionConfig("float16"), device) == "float16"
