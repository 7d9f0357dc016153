"""What `tpipe doctor` tells of a machine."""

import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tpipe_jax.commands import doctor
from tpipe_jax.commands.doctor import examine
from tpipe_jax.config.settings import Config, MemoryConfig, MeshConfig, ModelConfig


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_devices", lambda mesh: jax.devices()[: mesh.num_devices])


def test_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    config = Config(mesh=MeshConfig(pipe=2), memory=MemoryConfig(limit_gib=1.5))
    facts = examine(config, tmp_path / "run")
    assert f"jax {jax.__version__}" in facts["packages"]
    assert "NCCL_DEBUG=INFO" in facts["variables"]
    assert not any("secret" in text for text in facts.values())
    assert facts["devices"].startswith("2 x cpu")
    assert facts["a run here"] == (
        "data 1 x pipe 2 x model 1 of 2 devices, float32, attention xla, at most 1.5 GiB on each"
    )
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_work_is_told(tmp_path: Path):
    config = Config(ModelConfig(num_heads=4), MeshConfig(model=3))
    assert examine(config, tmp_path)["a run here"].startswith("cannot work: config.mesh.model=3")
    auto = Config(mesh=MeshConfig(pipe=4, auto=True))
    assert "would search" in examine(auto, tmp_path)["a run here"]


def test_devices_that_cannot_be_used_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_: MeshConfig) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(doctor, "find_devices", fail)
    facts = examine(Config(), tmp_path)
    assert facts["devices"] == "none can be used: no driver"
    assert "a run here" not in facts


@pytest.mark.slow
def test_the_command(tmp_path: Path):
    command = [sys.executable, "-m", "tpipe_jax", "doctor", "--config=quickstart"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a run here  data 1 x pipe 2 x model 1 of 2 devices" in done.stdout
    assert not list(tmp_path.iterdir())
