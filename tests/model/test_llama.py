"""Llama's block in the pipeline, against the same model without one; what it is made of, against
formulas that are written out.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support import fake_flash, reference
from support.marks import slow
from tpipe_jax.attention import backends, flash
from tpipe_jax.config.settings import (
    AttentionConfig,
    Config,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    TrainConfig,
)
from tpipe_jax.devices.mesh import make_mesh, shardings
from tpipe_jax.errors import UserError
from tpipe_jax.model import transformer
from tpipe_jax.model.flops import forward_flops
from tpipe_jax.model.rope import rotation
from tpipe_jax.model.sharding import param_specs
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.training.step import make_loss_and_grads

# A width that heads do not divide, three heads of queries for each of keys, an odd vocabulary.
MODEL = ModelConfig(
    num_layers=3, d_model=20, num_heads=6, num_kv_heads=2, head_width=6, d_ff=24, vocab_size=29,
    seq_len=24, family="llama",
)  # fmt: skip
QWEN = replace(MODEL, qkv_bias=True, qk_norm=True, tied_head=True, rope_theta=500.0)
MISTRAL = replace(MODEL, sliding_window=5, rope_scaling="llama3:4,1,4,16")
TOLERANCE = 1e-5
B = 4


def drawn(model: ModelConfig) -> dict:
    """Parameters with which tokens attend to something, and norms and biases that do something."""
    params = transformer.init(model, jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [a + 0.2 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noise)


def check_pipeline(model: ModelConfig, mesh: MeshConfig, plan: PlanConfig, **more: object) -> None:
    more = {"attention": AttentionConfig(block=4), **more}
    config = Config(model, mesh, plan, TrainConfig(batch_size=B), **more)  # pyrefly: ignore
    rows = np.random.default_rng(0).integers(0, model.vocab_size, (B, model.seq_len + 1))
    params = drawn(model)
    expected = jax.value_and_grad(lambda p: reference.loss(model, p, jnp.asarray(rows)))(params)
    devices = make_mesh(mesh, jax.devices()[: mesh.num_devices])
    staged = reference.to_stages(params, devices, plan.num_chunks)
    specs = param_specs(model, len(staged["blocks"]))
    step = make_loss_and_grads(make_spec(config, devices), make_schedule(reference.plan_of(config)))
    value, grads = step(jax.device_put(staged, shardings(devices, specs)), rows.astype(np.int32))
    grads = reference.from_stages(
        jax.tree.map(np.asarray, grads), model.num_layers, model.vocab_size, plan.num_chunks
    )
    assert float(value) == pytest.approx(float(expected[0]), rel=1e-6)
    reference.assert_close(grads, expected[1], TOLERANCE)


@pytest.mark.parametrize(
    "model", [slow(MODEL), slow(QWEN), MISTRAL], ids=["llama", "qwen", "mistral"]
)
def test_is_the_same_as_without_a_pipeline(model: ModelConfig) -> None:
    plan = PlanConfig("7,9,8", "uniform:2")
    check_pipeline(model, MeshConfig(data=2, pipe=2, model=2), plan)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [6, 3])
def test_each_device_has_a_copy_of_its_heads_of_keys(num_devices: int) -> None:
    """More devices than heads of keys, a multiple of them."""
    model = replace(QWEN, num_kv_heads=2 if num_devices == 6 else 1)
    check_pipeline(model, MeshConfig(model=num_devices), PlanConfig("uniform:3", "uniform:2"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "memory",
    [
        MemoryConfig(remat="full"),
        MemoryConfig(remat="attn,hidden,swiglu"),
        MemoryConfig(remat="dots", defer_weight_grads=True),
    ],
    ids=["full", "names", "deferred"],
)
def test_whatever_is_saved_gives_the_same_gradients(memory: MemoryConfig) -> None:
    model = replace(QWEN, sliding_window=7)
    check_pipeline(model, MeshConfig(pipe=2), PlanConfig("uniform:4", "uniform:2"), memory=memory)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "1f1b-deferred"])
def test_schedules(schedule: str) -> None:
    model = replace(MISTRAL, num_layers=4)
    plan = PlanConfig("uniform:4", "uniform:4", schedule=schedule)  # pyrefly: ignore
    check_pipeline(model, MeshConfig(pipe=2), plan)


def test_a_window_of_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels hide what is before it; nothing tells them for each token."""
    monkeypatch.setattr(backends, "_obstacle", lambda *_: None)
    monkeypatch.setattr(flash, "flash_kernels", lambda _: fake_flash.kernels(False))
    plan = PlanConfig("7,9,8", "uniform:2")
    check_pipeline(MISTRAL, MeshConfig(pipe=2), plan, attention=AttentionConfig("flash"))


def test_a_window_that_is_as_long_as_the_sequence_is_none() -> None:
    assert replace(MODEL, sliding_window=24).window is None
    assert replace(MODEL, sliding_window=23).window == 23


def test_a_token_sees_its_window_alone() -> None:
    """A change of a token changes the logits of the next four and of no other, in one layer."""
    model = replace(MISTRAL, num_layers=1)
    params, tokens = drawn(model), np.arange(24)[None] % 29
    changed = tokens.copy()
    changed[0, 10] = 28
    before, after = (
        np.asarray(reference.plain_model.logits(model, params, jnp.asarray(a)))
        for a in (tokens, changed)
    )
    differs = np.abs(before - after)[0].max(-1) > 0
    np.testing.assert_array_equal(np.flatnonzero(differs), range(10, 15))


def test_operations_are_those_of_the_pairs_that_are_seen() -> None:
    """Of each slice, by counting pairs one by one."""
    for model in (MISTRAL, replace(MISTRAL, sliding_window=None)):
        products = forward_flops(model, 1, 0) - 4 * 6 * 6
        for context, num_tokens in ((0, 24), (0, 3), (2, 7), (10, 4)):
            seen = [
                min(token + 1, model.window or 24) for token in range(context, context + num_tokens)
            ]
            expected = num_tokens * products + 4 * 6 * 6 * sum(seen)
            assert forward_flops(model, num_tokens, context) == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_kv_heads", 2), ("rope_theta", 5.0), ("qk_norm", True), ("sliding_window", 3)],
)
def test_what_gpt2_has_not_is_refused(field: str, value: object) -> None:
    with pytest.raises(UserError, match=rf"config\.model\.{field}={value} is nothing that gpt2"):
        Config(replace(ModelConfig(), **{field: value}))  # pyrefly: ignore


@pytest.mark.parametrize(
    "setting",
    [
        "linear",
        "linear:0",
        "linear:1,2",
        "llama3:8,1,4",
        "llama3:8,4,4,16",
        "yarn:2",
        "ntk:2",
        "yarn:x,1",
    ],
)
def test_a_scaling_that_is_none_is_named(setting: str) -> None:
    with pytest.raises(UserError, match=rf"config\.model\.rope_scaling={setting} is none: give"):
        rotation(replace(MODEL, rope_scaling=setting))


def test_scores_depend_on_the_distance_alone() -> None:
    turn = rotation(replace(MODEL, rope_theta=100.0)).turned
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 6))
    at = lambda n: jnp.full((1, 1), n)  # noqa: E731
    near, far = (jnp.vdot(turn(q, at(n + 3)), turn(k, at(n))) for n in (0, 1000))
    assert float(near) == pytest.approx(float(far), abs=1e-4)
    assert float(near) != pytest.approx(float(jnp.vdot(turn(q, at(4)), turn(k, at(0)))), abs=1e-2)
