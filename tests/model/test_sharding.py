"""Which meshes can divide a model, and where its parameters lie."""

from functools import partial

import chex
import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from support import reference
from tpipe_jax.config.settings import MeshConfig, ModelConfig
from tpipe_jax.devices import mesh
from tpipe_jax.errors import UserError
from tpipe_jax.model import sharding, transformer


def open_mesh(config: MeshConfig) -> Mesh:
    return mesh.make_mesh(config, jax.devices()[: config.num_devices])


def model_config(num_layers: int, vocab_size: int = 10) -> ModelConfig:
    return ModelConfig(num_layers, d_model=8, num_heads=2, vocab_size=vocab_size, seq_len=4)


def draw_params(config: ModelConfig) -> reference.Params:
    """No value is 0, so that padding can be told from parameters."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    return jax.tree.map(lambda a: random.uniform(1, 2, a.shape).astype(a.dtype), shapes)


@pytest.mark.parametrize(
    ("model_size", "d_ff", "sentence"),
    [
        (3, None, "config.mesh.model=3 does not divide config.model.num_heads=4: pick a divisor."),
        (4, 30, "config.mesh.model=4 does not divide config.model.d_ff=30: pick a divisor."),
        (8, None, "config.mesh.model=8 does not divide config.model.num_heads=4: pick a divisor."),
    ],
)
def test_model_that_operators_do_not_divide_into_is_refused(
    model_size: int, d_ff: int | None, sentence: str
) -> None:
    config = ModelConfig(d_model=16, num_heads=4, d_ff=d_ff)
    with pytest.raises(UserError) as error:
        sharding.check_model(config, MeshConfig(model=model_size))
    assert str(error.value) == sentence


@pytest.mark.parametrize("model_size", [1, 2, 4])
def test_model_that_operators_divide_into_is_accepted(model_size: int) -> None:
    config = ModelConfig(d_model=16, num_heads=4, d_ff=28)
    sharding.check_model(config, MeshConfig(data=3, pipe=5, model=model_size))


def test_more_layers_than_can_be_compiled_are_refused() -> None:
    sharding.check_model(ModelConfig(num_layers=sharding.MAX_LAYERS), MeshConfig())
    with pytest.raises(UserError, match=r"num_layers=10001 is more than the 10000 that can"):
        sharding.check_model(ModelConfig(num_layers=sharding.MAX_LAYERS + 1), MeshConfig())


MESHES = [MeshConfig(), MeshConfig(pipe=2), MeshConfig(pipe=3, model=2), MeshConfig(2, 4, 1)]


@pytest.mark.parametrize("num_chunks", [1, 2])
@pytest.mark.parametrize("num_layers", [1, 4, 5])
@pytest.mark.parametrize("config", MESHES, ids=str)
def test_to_stages_keeps_every_parameter_once_and_pads_with_zeros(
    config: MeshConfig, num_layers: int, num_chunks: int
) -> None:
    params = draw_params(model_config(num_layers))
    staged = reference.to_stages(params, open_mesh(config), num_chunks)
    chex.assert_trees_all_equal(reference.from_stages(staged, num_layers, 10, num_chunks), params)

    def num_nonzero(tree: reference.Params) -> int:
        return sum(np.count_nonzero(a) for a in jax.tree.leaves(tree))

    assert num_nonzero(staged) == num_nonzero(params)
    num_rows, rest = divmod(len(staged["embed"]["tokens"]), config.pipe * config.model)
    assert rest == 0
    assert num_rows == (16 if config.pipe * config.model == 1 else 8)


@pytest.mark.parametrize(
    ("vocab_size", "config", "num_rows"),
    [
        (256, MeshConfig(pipe=2), 128),
        (50257, MeshConfig(), 50304),
        (50257, MeshConfig(pipe=4, model=2), 6400),
        (50257, MeshConfig(data=2, pipe=2, model=2), 12672),
        (257, MeshConfig(pipe=8), 40),
    ],
)
def test_rows_of_the_vocabulary_are_aligned(
    vocab_size: int, config: MeshConfig, num_rows: int
) -> None:
    """On each device, to 16 bytes, and to whole tiles of products where that is little more."""
    size = sharding.padded_vocab_size(ModelConfig(vocab_size=vocab_size), open_mesh(config))
    assert size == num_rows * config.pipe * config.model


@pytest.mark.parametrize("num_layers", [1, 5])
def test_specs_fit_the_parameters_and_divide_all_operators(num_layers: int) -> None:
    config = MeshConfig(pipe=2, model=2)
    devices = open_mesh(config)
    params = reference.to_stages(draw_params(model_config(num_layers)), devices)
    specs = sharding.param_specs(model_config(num_layers), len(params["blocks"]))
    placed = jax.device_put(params, mesh.shardings(devices, specs))  # the same tree, divisible
    chex.assert_trees_all_equal(placed, params)

    def num_parts(a: jax.Array) -> tuple[int, ...]:
        shard = a.sharding.shard_shape(a.shape)
        return tuple(whole // part for whole, part in zip(a.shape, shard, strict=True))

    assert num_parts(placed["embed"]["tokens"]) == (4, 1)
    kernel_in = {"kernel": (2, 1, 2), "bias": (2, 2)}  # stages, then what 'model' divides
    kernel_out = {"kernel": (2, 2, 1), "bias": (2, 1)}
    norm = {"scale": (2, 1), "bias": (2, 1)}
    for block in placed["blocks"]:
        assert jax.tree.map(num_parts, block) == {
            "norm_1": norm,
            "attn_in": kernel_in,
            "attn_out": kernel_out,
            "norm_2": norm,
            "ff_in": kernel_in,
            "ff_out": kernel_out,
        }


def test_a_stage_has_consecutive_layers() -> None:
    params = draw_params(model_config(5))
    params["blocks"] = [
        jax.tree.map(partial(np.full_like, fill_value=1 + n), block)
        for n, block in enumerate(params["blocks"])
    ]
    staged = reference.to_stages(params, open_mesh(MeshConfig(pipe=3)))
    for leaf in zip(*map(jax.tree.leaves, staged["blocks"]), strict=True):
        layers = [[float(slot[stage].mean()) for slot in leaf] for stage in range(3)]
        assert layers == [[1, 2], [3, 4], [5, 0]]
