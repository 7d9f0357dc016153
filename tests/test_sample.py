"""Sampling through the pipeline, against the same draws from the plain model."""

import jax
import numpy as np

import reference
from tpipe_jax import model
from tpipe_jax.config import Config, MeshConfig, ModelConfig, PlanConfig
from tpipe_jax.mesh import make_mesh, param_specs, shardings
from tpipe_jax.sample import TEMPERATURE, sample


def test_samples_as_the_plain_model_does():
    config = Config(
        model=ModelConfig(num_layers=3, d_model=16, num_heads=2, vocab_size=29, seq_len=8),
        mesh=MeshConfig(data=2, pipe=2),
        plan=PlanConfig(token_slices="5,3", batch_slices="uniform:4"),
    )
    mesh = make_mesh(config.mesh, jax.devices()[:4])
    params = model.init(config.model, jax.random.key(1))
    # Larger embeddings, so that the model matters in the draws.
    params["embed"] = jax.tree.map(lambda a: 20 * a, params["embed"])
    on_mesh = jax.device_put(reference.to_stages(params, mesh), shardings(mesh, param_specs(2)))
    prompt = np.array([3, 1, 4], np.int32)
    drawn = sample(config, mesh, reference.plan_of(config), on_mesh, prompt, 12)

    random = np.random.default_rng(config.train.seed)
    tokens = list(prompt)
    logits_of = jax.jit(lambda tokens: model.logits(config.model, params, tokens))
    for _ in range(12):
        context = np.array(tokens[-8:], np.int32)
        padded = np.zeros((1, 8), np.int32)
        padded[0, : len(context)] = context
        logits_V = np.asarray(logits_of(padded))[0, len(context) - 1]
        tokens.append(int(np.argmax(logits_V / TEMPERATURE + random.gumbel(size=29))))
    assert drawn.tolist() == tokens[3:]
    assert len(set(tokens[3:])) >= 3
