"""Mixtures of experts in the pipeline, with their balance loss, against the plain model."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from support import reference
from support.marks import slow
from tpipe_jax.config.settings import (
    IGNORE,
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
from tpipe_jax.model.sharding import check_model, param_specs
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.training import step

MODEL = ModelConfig(
    num_layers=3, d_model=20, num_heads=6, num_kv_heads=2, head_width=6, d_ff=10, vocab_size=29,
    seq_len=24, family="llama", num_experts=4, qk_norm=True,
)  # fmt: skip
OTHER = replace(MODEL, num_experts=6, experts_per_token=3, norm_topk_prob=False, qk_norm=False)
WEIGHT = 0.5  # so that its gradients are as large as those of the loss
B = 4


def run(config: Config) -> tuple[Any, Any, Any]:
    """Losses and gradients of the pipeline, and what the plain model has."""
    model, mesh = config.model, config.mesh
    params = transformer.init(model, jax.random.key(1))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [a + 0.2 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(tree, noise)
    rows = np.random.default_rng(0).integers(0, model.vocab_size, (B, model.seq_len + 1))
    rows[1, 9:], rows[3, 20:] = IGNORE, IGNORE  # padding

    def total(params: Any) -> tuple[jax.Array, Any]:
        loss, balance = reference.losses(model, params, rows)
        return loss + config.balance_weight * balance, (loss, balance)

    (_, expected), expected_grads = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    devices = make_mesh(mesh, jax.devices()[: mesh.num_devices])
    staged = reference.to_stages(params, devices, config.plan.num_chunks)
    specs = param_specs(model, len(staged["blocks"]))
    schedule = make_schedule(reference.plan_of(config))
    own = step._make_losses_and_grads(make_spec(config, devices), schedule)
    staged = jax.device_put(staged, shardings(devices, specs))
    values, grads = own(staged, rows.astype(np.int32), jnp.float32(1))
    grads = reference.from_stages(
        jax.tree.map(np.asarray, grads), model.num_layers, model.vocab_size, config.plan.num_chunks
    )
    assert float(values["loss"]) == pytest.approx(float(expected[0]), rel=1e-6)
    if config.balance_weight:
        assert float(values["balance_loss"]) == pytest.approx(float(expected[1]), rel=1e-6)
    else:
        assert "balance_loss" not in values
    reference.assert_close(grads, expected_grads, 1e-5)
    return values, grads, expected


TERAPIPE = PlanConfig("7,9,8", "uniform:2", schedule="terapipe")


@pytest.mark.parametrize(
    ("model", "mesh", "more"),
    [
        slow(MODEL, MeshConfig(data=2, pipe=2, model=2), {}),
        (MODEL, MeshConfig(pipe=2), {}),
        slow(OTHER, MeshConfig(), {}),
        slow(OTHER, MeshConfig(model=2), {}),
        slow(OTHER, MeshConfig(pipe=2), {"memory": MemoryConfig(remat="full")}),
        slow(MODEL, MeshConfig(data=2, pipe=3), {"memory": MemoryConfig(defer_weight_grads=True)}),
        slow(
            replace(OTHER, num_layers=4),
            MeshConfig(pipe=2, model=2),
            {"plan": replace(TERAPIPE, schedule="interleaved", chunks=2)},
        ),
        slow(OTHER, MeshConfig(pipe=2), {"plan": replace(TERAPIPE, schedule="1f1b"), "weight": 0}),
        slow(
            OTHER,
            MeshConfig(pipe=3),
            {"plan": replace(TERAPIPE, schedule="1f1b-deferred"), "weight": 0},
        ),
    ],
    ids=lambda value: "" if isinstance(value, ModelConfig) else str(value),
)
def test_is_the_same_as_without_a_pipeline(model: ModelConfig, mesh: MeshConfig, more: dict):
    more = {"plan": TERAPIPE, "weight": WEIGHT} | more
    train = TrainConfig(batch_size=B, balance_weight=more.pop("weight"))
    run(Config(model, mesh, train=train, attention=AttentionConfig(block=4), **more))


def test_settings_that_do_not_go_together():
    """A part of the batch at a time has no balance loss; a model without experts has none."""
    with pytest.raises(UserError, match=r"balance_weight=0.5 is for mixtures of experts"):
        Config(train=TrainConfig(balance_weight=0.5))
    config = Config(MODEL, MeshConfig(pipe=2), replace(TERAPIPE, schedule="1f1b"))
    with pytest.raises(UserError, match=r"set config.train.balance_weight=0 or config.plan.sched"):
        reference.plan_of(config)
    plan = replace(reference.plan_of(replace(config, plan=TERAPIPE)), schedule="1f1b")
    spec = make_spec(config, make_mesh(config.mesh, jax.devices()[:2]))
    with pytest.raises(UserError, match=r"balance_weight=0.001 needs all of a batch at once"):
        step.make_loss_and_grads(spec, make_schedule(plan))
    with pytest.raises(UserError, match=r"config.mesh.model=3 does not divide .*num_experts=4"):
        check_model(MODEL, MeshConfig(model=3))
