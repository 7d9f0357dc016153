"""Which format the devices are fast in."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tpipe_jax.config.settings import (
    PrecisionConfig,
)
from tpipe_jax.devices.precision import compute_format


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", None, "float32"),
        ("gpu", "7.0", "float16"),
        ("gpu", "7.5", "float16"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "9.0", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
        ("tpu", None, "bfloat16"),
    ],
)
def test_auto_is_what_the_device_is_fast_in(platform: str, capability: str | None, expected: str):
    device = SimpleNamespace(platform=platform)
    if capability:
        device.compute_capability = capability
    mesh: Any = SimpleNamespace(devices=np.array([device], object))
    assert compute_format(PrecisionConfig(), mesh) == expected
    assert compute_format(PrecisionConfig("float16"), mesh) == "float16"
