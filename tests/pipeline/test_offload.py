"""Saved values in the memory of the host: the same bits, and less memory of a device."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from support import reference
from support.marks import slow
from tpipe_jax.config.settings import (
    Config,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    ScheduleName,
    TrainConfig,
)
from tpipe_jax.devices.hardware import DeviceFacts
from tpipe_jax.devices.mesh import make_mesh, shardings
from tpipe_jax.errors import UserError
from tpipe_jax.model import transformer
from tpipe_jax.model.sharding import param_specs
from tpipe_jax.pipeline.build import packing_of, saved_of
from tpipe_jax.pipeline.footprint import activation_bytes_per_token, host_bytes_per_token
from tpipe_jax.pipeline.spec import make_spec, spec_on_devices
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.training import memory
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.step import make_loss_and_grads

CONFIG = Config(
    ModelConfig(num_layers=4, d_model=16, num_heads=2, vocab_size=29, seq_len=12),
    MeshConfig(pipe=2),
    PlanConfig("5,4,3", "uniform:2", schedule="terapipe"),
    TrainConfig(batch_size=4),
    memory=MemoryConfig(remat="dots"),
)
OFFLOADED = replace(CONFIG, memory=replace(CONFIG.memory, offload=True))


@pytest.mark.parametrize(
    ("schedule", "memory_config"),
    [
        slow("1f1b-deferred", {}),
        ("terapipe", {}),
        slow("1f1b", {"remat": "attn"}),
        slow("interleaved", {}),
        slow("terapipe", {"defer_weight_grads": True}),
    ],
)
def test_changes_no_bit(schedule: ScheduleName, memory_config: dict):
    """CPUs have the memory of the host only, but the same programs."""
    results, texts = [], []
    for config in (CONFIG, OFFLOADED):
        plan = replace(config.plan, schedule=schedule)
        config = replace(config, plan=plan, memory=replace(config.memory, **memory_config))
        mesh = make_mesh(config.mesh, jax.devices()[:2])
        chunks = config.plan.num_chunks
        params = reference.to_stages(
            transformer.init(config.model, jax.random.key(0)), mesh, chunks
        )
        specs = param_specs(config.model, len(params["blocks"]))
        params = jax.device_put(params, shardings(mesh, specs))
        step = make_loss_and_grads(
            make_spec(config, mesh), make_schedule(reference.plan_of(config))
        )
        rows = np.random.default_rng(0).integers(0, 29, (4, 13)).astype(np.int32)
        texts.append(str(jax.make_jaxpr(step)(params, rows)))
        results.append(jax.tree.map(np.asarray, step(params, rows)))
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert "<host>" in texts[1]
    assert "<host>" not in texts[0]


def test_a_device_keeps_caches_alone():
    mesh = make_mesh(CONFIG.mesh, jax.devices()[:2])
    here, there = make_spec(CONFIG, mesh), make_spec(OFFLOADED, mesh)
    shapes = jax.eval_shape(lambda: saved_of(here, packing_of(here, 5), 1))
    values, caches = (
        sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(leaves)) // 12
        for leaves in ([s.values for s in shapes], [s.cache for s in shapes])
    )
    assert activation_bytes_per_token(here)[0] == values + caches
    assert activation_bytes_per_token(there)[0] == caches
    assert (host_bytes_per_token(here), host_bytes_per_token(there)) == (0, values)
    schedule = make_schedule(reference.plan_of(CONFIG))
    assert memory.host_bytes(there, schedule) == values * 4 * 12


def test_other_devices_are_refused():
    with pytest.raises(UserError, match=r"offload=true is for GPUs, and these devices are CPUs"):
        spec_on_devices(OFFLOADED, jax.devices()[:2])
    spec_on_devices(OFFLOADED, jax.devices()[:2], DeviceFacts("gpu", "H100", (9, 0), 91002, 1e9))


@pytest.mark.slow
def test_small_hosts_are_refused_or_keep_less(monkeypatch: pytest.MonkeyPatch):
    spec = make_spec(OFFLOADED, make_mesh(CONFIG.mesh, jax.devices()[:2]))
    plan, optimizer = reference.plan_of(CONFIG), make_optimizer(CONFIG)
    needed = memory.host_bytes(spec, make_schedule(plan))
    assert memory.host_limit_bytes(spec) > needed
    assert memory.host_limit_bytes(make_spec(CONFIG, spec.mesh)) == float("inf")
    monkeypatch.setattr(memory, "_machine_bytes", lambda: 2.0 * needed - 1)
    with pytest.raises(UserError, match=r"keeps .* GiB on the host for each device, with .*=dots"):
        memory.fitting_step(spec, plan, optimizer)
    monkeypatch.setattr(memory, "_machine_bytes", lambda: 2.0 * needed)
    assert memory.fitting_step(spec, plan, optimizer)[0].saved_names == spec.saved_names
    monkeypatch.setattr(memory, "_machine_bytes", lambda: 2.0 * needed - 1)
    auto = replace(OFFLOADED, memory=replace(OFFLOADED.memory, remat="auto"))
    found, _ = memory.fitting_step(spec.with_config(auto), plan, optimizer)
    assert found.config.memory.remat == "attn"  # the first that fits the host


@pytest.mark.parametrize(
    ("text", "expected"), [("1048576\n", 2**20), ("max\n", None), (None, None)]
)
def test_a_container_has_less_memory(
    text: str | None, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "CONTAINER_LIMIT", tmp_path / "memory.max")
    whole = memory._machine_bytes()
    assert whole > 2**30
    if text is not None:
        (tmp_path / "memory.max").write_text(text)
    assert memory._machine_bytes() == (expected or whole)
