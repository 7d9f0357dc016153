"""What is asked of devices before programs are made for them."""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from tpipe_jax.config.settings import MeshConfig
from tpipe_jax.devices import hardware
from tpipe_jax.devices.hardware import DeviceFacts, facts_of
from tpipe_jax.devices.mesh import make_mesh


def mesh_of(platform: str, *capabilities: str, memory: dict[str, int] | None = None) -> Any:
    """A mesh of such devices, which do not exist."""
    devices = [
        SimpleNamespace(
            platform=platform,
            device_kind=f"{platform} {capability}",
            compute_capability=capability,
            memory_stats=lambda: memory,
        )
        for capability in capabilities
    ]
    return SimpleNamespace(devices=np.array(devices, object), local_devices=devices)


@pytest.fixture(autouse=True)
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cudnn_version", lambda: 91002)


def test_cpus_tell_little():
    config = MeshConfig(pipe=2)
    facts = facts_of(make_mesh(config, jax.devices()[:2]))
    assert facts == DeviceFacts("cpu", "cpu")


def test_a_gpu_tells_all():
    mesh = mesh_of("gpu", "9.0", memory={"bytes_limit": 1 << 30, "bytes_in_use": 5})
    assert facts_of(mesh) == DeviceFacts("gpu", "gpu 9.0", (9, 0), 91002, 1 << 30)


def test_the_oldest_counts():
    facts = facts_of(mesh_of("gpu", "9.0", "10.0", "7.0", "8.0"))
    assert (facts.kind, facts.capability) == ("gpu 7.0", (7, 0))


def test_gpus_of_others_have_no_compute_capability():
    assert facts_of(mesh_of("gpu", "gfx942")) == DeviceFacts("gpu", "gpu gfx942")
