"""Devices that are not here: what is known of them, and what is refused. Nothing is compiled."""

from typing import get_args

import jax
import pytest

from tpipe_jax.config.flags import Gpu
from tpipe_jax.config.settings import MeshConfig
from tpipe_jax.devices import hardware, startup, targets
from tpipe_jax.devices.hardware import GIB, DeviceFacts
from tpipe_jax.devices.targets import GPUS, gpu_target, tpu_target
from tpipe_jax.errors import UserError


class Device:
    device_kind, process_index = "TPU v5 lite", 0


class Topology:
    devices = (Device(),) * 8


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What XLA's compilers would be asked for; all are installed."""
    found: dict[str, str] = {}

    def describe(platform: str, **options: str) -> Topology:
        found.update(options, platform=platform)
        return Topology()

    monkeypatch.setattr(targets.topologies, "get_topology_desc", describe)
    monkeypatch.setattr(targets, "_is_installed", lambda name: True)
    monkeypatch.setattr(hardware.jax, "__version_info__", (0, 11, 2))
    for variable in hardware.FRACTION_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    return found


def test_every_gpu_that_can_be_asked_for_is_known():
    assert tuple(GPUS) == get_args(Gpu)


@pytest.mark.parametrize(
    ("num_devices", "hosts", "expected"),
    [
        (1, None, "1x1x1"),
        (6, None, "1x1x6"),
        (8, None, "1x1x8"),
        (16, None, "1x2x8"),
        (6, 3, "1x3x2"),
        (384, 48, "1x48x8"),
    ],
)
def test_hosts_share_the_devices(
    num_devices: int, hosts: int | None, expected: str, asked: dict[str, str]
):
    gpu_target("v100", MeshConfig(pipe=num_devices), hosts)
    assert asked["topology"] == expected


@pytest.mark.parametrize(
    ("num_devices", "hosts", "sentence"),
    [
        (320, 7, r"^--hosts=7 cannot share the 320 devices of config\.mesh evenly: set --hosts to"),
        (12, None, r"^hosts of 8 GPUs cannot share the 12 devices .* a divisor of 12\.$"),
    ],
)
def test_hosts_that_cannot_share_are_refused(num_devices: int, hosts: int | None, sentence: str):
    with pytest.raises(UserError, match=sentence):
        gpu_target("v100", MeshConfig(pipe=num_devices), hosts)


@pytest.mark.parametrize("name", GPUS)
def test_xla_is_told_of_each_gpu(name: str, asked: dict[str, str]):
    target = gpu_target(name, MeshConfig(), None)
    gpu = GPUS[name]
    assert f"device_memory_size: {gpu.memory_bytes}" in asked["target_config"]
    major, minor = gpu.capability
    assert f"major: {major} minor: {minor}" in asked["target_config"]
    assert ("ACCELERATED" in asked["target_config"]) == (major >= 9)
    assert "major: 9 minor: 10 patch: 2" in asked["target_config"]  # cuDNN
    assert target.facts.kind == gpu.kind
    assert target.facts.capability == gpu.capability


def test_memory_is_what_jax_takes_less_the_allowance(monkeypatch: pytest.MonkeyPatch):
    def usable() -> float:
        return gpu_target("v100", MeshConfig(), None).facts.memory_bytes

    total = GPUS["v100"].memory_bytes
    assert usable() == 0.75 * total - GIB / 2
    assert GPUS["v100-32"].memory_bytes == 2 * total
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "0.9")
            assert usable() == 0.9 * total - GIB / 2
            for text in ("90%", "", "1.5", "0"):
                patch.setenv(name, text)
                sentence = f"^{name}={text} must be a number above 0 and at most 1, such as 0.9"
                with pytest.raises(UserError, match=sentence):
                    usable()


def test_a_topology_of_tpus(asked: dict[str, str]):
    target = tpu_target("v5e:2x4", MeshConfig(pipe=8))
    assert (asked["platform"], asked["topology_name"]) == ("tpu", "v5e:2x4")
    assert target.facts == DeviceFacts("tpu", "TPU v5 lite", memory_bytes=15.75 * GIB)
    with pytest.raises(UserError, match=r"^--tpu=v5e:2x4 has 8 devices, and config\.mesh has 4: "):
        tpu_target("v5e:2x4", MeshConfig(pipe=4))


def test_a_topology_that_libtpu_does_not_know(monkeypatch: pytest.MonkeyPatch):
    def fail(**_: str) -> None:
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no such\ntopology")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", fail)
    with pytest.raises(UserError, match=r"take --tpu=v9:1x1 \(INVALID_ARGUMENT: no such top"):
        tpu_target("v9:1x1", MeshConfig())


def test_a_compiler_that_does_not_work(monkeypatch: pytest.MonkeyPatch):
    def fail(**_: str) -> None:
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr(targets.topologies, "get_topology_desc", fail)
    with pytest.raises(UserError, match=r"^the compiler for GPUs does not work here \(topology n"):
        gpu_target("h100", MeshConfig(), None)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(targets, "_is_installed", lambda name: False)
    with pytest.raises(UserError, match=r"^there is no compiler for GPUs here: pip install \"tpip"):
        gpu_target("h100", MeshConfig(), None)
    with pytest.raises(UserError, match=r"^there is no compiler for TPUs here: pip install \"tpi"):
        tpu_target("v5e:2x2", MeshConfig(pipe=4))


def test_gpus_need_a_jax_that_does_not_copy(monkeypatch: pytest.MonkeyPatch):
    """For programs compiled here as for those that run here."""
    monkeypatch.setattr(hardware.jax, "__version_info__", (0, 11, 0))
    monkeypatch.setattr(hardware.jax, "__version__", "0.11.0")
    sentence = r"^GPUs need jax 0\.11\.1 or newer, and this is jax 0\.11\.0, whose programs for"
    with pytest.raises(UserError, match=sentence):
        gpu_target("h100", MeshConfig(), None)

    class Gpu:
        platform = "gpu"

    monkeypatch.setattr(startup.jax, "devices", lambda: [Gpu()])
    monkeypatch.setattr(startup, "prepare_cpu", lambda n: None)
    monkeypatch.setattr(startup.jax.config, "update", lambda *_: None)
    with pytest.raises(UserError, match=sentence):
        startup.find_devices(MeshConfig())
    monkeypatch.setattr(hardware.jax, "__version_info__", (0, 11, 1))
    assert len(startup.find_devices(MeshConfig())) == 1
