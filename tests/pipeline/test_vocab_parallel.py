"""Embedding, head and loss divided among stages, against whole ones."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec

from support import reference
from tpipe_jax.config.settings import IGNORE, MeshConfig, ModelConfig
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.pipeline import vocab_parallel
from tpipe_jax.pipeline.vocab_parallel import Head

Params = Any  # nested dictionaries and lists of arrays

B, T, D = 4, 9, 8
MESHES = [MeshConfig(pipe=1), MeshConfig(pipe=2), MeshConfig(pipe=4), MeshConfig(data=2, pipe=2)]
VOCAB_SIZES = [32, 37, 5]  # divided by 4; not divided; not even one token for each of 4 stages
# Float32 rounds to 6e-8, and sums run over at most 36 tokens and 37 logits: 5e-7 is seen.
TOLERANCE = 1e-5

DATA, PIPE, ALL = PartitionSpec("data"), PartitionSpec("pipe"), PartitionSpec()
HEAD_SPECS = Head({"scale": ALL, "bias": ALL}, PIPE)
EMBED_SPECS = {"tokens": PIPE, "positions": ALL}


class Inputs(NamedTuple):
    head: Head
    y: Array
    targets: Array


def open_mesh(config: MeshConfig) -> Mesh:
    return make_mesh(config, jax.devices()[: config.num_devices])


def over(mesh: Mesh, function: Any, in_specs: Any, out_specs: Any) -> Any:
    axes = {"data", "pipe"}
    return jax.jit(
        jax.shard_map(function, mesh=mesh, axis_names=axes, in_specs=in_specs, out_specs=out_specs)
    )


def draw(vocab_size: int) -> Inputs:
    """Half of the first sequence and all of the second don't count: shards differ in that."""
    random = np.random.default_rng(vocab_size)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    targets = random.integers(0, vocab_size, (B, T)).astype(np.int32)
    targets[0, : T // 2] = targets[1] = IGNORE
    norm = {"scale": 1 + 0.5 * normal(D), "bias": normal(D)}
    return Inputs(Head(norm, normal(vocab_size, D)), 2 * normal(B, T, D), jnp.asarray(targets))


def pad(table_VD: Array, num_stages: int) -> Array:
    """The rows that are no token would win by far if they took part."""
    fill = -len(table_VD) % num_stages
    return jnp.pad(table_VD, ((0, fill), (0, 0)), constant_values=1e3)


def reference_logits(head: Head, y: Array) -> Array:
    centred = y - y.mean(-1, keepdims=True)
    normed = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return (normed * head.norm["scale"] + head.norm["bias"]) @ head.table_VD.T


def reference_loss(head: Head, y: Array, targets: Array) -> Array:
    """Sum over the targets that count."""
    logits = reference_logits(head, y)
    found = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
    return -found.sum(where=targets != IGNORE)


WEIGHT = 0.125  # of the loss in gradients; a power of two, so that it is exact


def at_stage(stage: int, value: Array) -> Array:
    """The value on one stage, and NaN on the others, where it must not be read."""
    return jnp.where(lax.axis_index("pipe") == stage, value, jnp.nan)


def parts(batch_size: int) -> list[slice]:
    """Two parts of a batch, if it has more than one sequence."""
    return [slice(1), slice(1, None)] if batch_size > 1 else [slice(1)]


def model_of(vocab_size: int) -> ModelConfig:
    return ModelConfig(d_model=D, vocab_size=vocab_size)


def cross_entropy_and_grads(
    model: ModelConfig, head: Head, y: Array, targets: Array, is_tied: bool = True
) -> tuple[Array, Head, Array]:
    """Of one part of the batch after another, with gradients of WEIGHT times the loss."""
    params = {"embed": {"tokens": head.table_VD, "positions": jnp.zeros((1, D))}, "norm": head.norm}
    if not is_tied:
        params["head"] = {"table": head.table_VD}
    sums, d_y = vocab_parallel.no_sums(params), []
    for rows in parts(len(y)):
        of_part = y[rows], targets[rows], WEIGHT
        sums, d_y_part = vocab_parallel.add_cross_entropy_and_grads(model, sums, head, *of_part)
        d_y.append(d_y_part)
    found = vocab_parallel.gradients_of(sums, WEIGHT)
    if is_tied:
        return sums.loss, Head(found["norm"], found["embed"]["tokens"]), jnp.concatenate(d_y)
    d_head = Head(found["norm"], found["head"]["table"] + found["embed"]["tokens"])
    return sums.loss, d_head, jnp.concatenate(d_y)


def embed_grads(params: Params, tokens: Array, d_x: Array) -> Params:
    """Of one part of the batch after another."""
    sums = vocab_parallel.no_sums({"embed": params, "norm": {}})
    for rows in parts(len(tokens)):
        d_embed = vocab_parallel.add_embed_grads(sums.d_embed, tokens[rows], d_x[rows], WEIGHT)
        sums = sums._replace(d_embed=d_embed)
    return vocab_parallel.gradients_of(sums, WEIGHT)["embed"]


def check_loss(config: MeshConfig, vocab_size: int, is_tied: bool = True) -> None:
    model = model_of(vocab_size)

    def local(head: Head, y: Array, targets: Array) -> tuple[Array, Array, Head, Array]:
        y = at_stage(config.pipe - 1, y)
        only_value = vocab_parallel.cross_entropy(model, head, y, targets)
        value, d_head, d_y = cross_entropy_and_grads(model, head, y, targets, is_tied)
        return *lax.psum((only_value, value, d_head), "data"), d_y[None]

    head, y, targets = draw(vocab_size)
    padded = head._replace(table_VD=pad(head.table_VD, config.pipe))
    out_specs = ALL, ALL, HEAD_SPECS, PartitionSpec("pipe", "data")
    run = over(open_mesh(config), local, (HEAD_SPECS, DATA, DATA), out_specs)
    only_value, value, d_head, d_y_of_stages = run(padded, y, targets)
    d_head, d_y = jax.tree.map(lambda g: g / WEIGHT, (d_head, d_y_of_stages[-1]))

    want, (want_d_head, want_d_y) = jax.value_and_grad(reference_loss, (0, 1))(head, y, targets)
    table = d_head.table_VD
    got = only_value, value, d_head._replace(table_VD=table[:vocab_size]), d_y
    reference.assert_close(got, (want, want, want_d_head, want_d_y), TOLERANCE)
    np.testing.assert_array_equal(table[vocab_size:], 0)
    np.testing.assert_array_equal(d_y[targets == IGNORE], 0)


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("config", MESHES, ids=str)
def test_cross_entropy_equals_plain_jax(config: MeshConfig, vocab_size: int) -> None:
    check_loss(config, vocab_size)


def test_a_head_with_a_table_of_its_own() -> None:
    """The embedding gets no gradients of the head then, not even zeros that are wrong."""
    check_loss(MeshConfig(data=2, pipe=2), 37, is_tied=False)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_in_short_formats(dtype: Any) -> None:
    """Those of a head whose products are short, by rounding what goes into them: 2^-9 or 2^-12 of
    each, and tokens of a probability of 1e-7 count in float16 too.
    """
    head, y, targets = draw(37)
    table = jnp.concatenate([head.table_VD, 1e-3 * head.table_VD])
    head = head._replace(table_VD=jnp.asarray(table, dtype).astype(jnp.float32))
    head.norm["bias"] = jnp.zeros(D)
    want = jax.grad(reference_loss, (0, 1))(head, y, targets)

    def local(head: Head, y: Array, targets: Array) -> tuple[Head, Array]:
        short = head._replace(table_VD=head.table_VD.astype(dtype))
        _, d_head, d_y = cross_entropy_and_grads(model_of(74), short, y, targets)
        return lax.psum(d_head, "data"), d_y

    specs = HEAD_SPECS, PartitionSpec(("data", "pipe"))
    got = over(open_mesh(MeshConfig()), local, (HEAD_SPECS, DATA, DATA), specs)(head, y, targets)
    assert got[0].table_VD.dtype == jnp.float32
    got = jax.tree.map(lambda g: g / WEIGHT, got)
    reference.assert_close(got, want, 4 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 36])
def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    """One tile or many, some with nothing that counts, some that don't divide the tokens."""
    monkeypatch.setattr(vocab_parallel, "TILE_TOKENS", num_tokens)
    check_loss(MeshConfig(pipe=2), 37)


def test_logits_may_be_large() -> None:
    """Logits beyond 88, where float32's exp overflows."""
    head, y, targets = draw(37)
    head = head._replace(table_VD=60 * head.table_VD)
    assert jnp.abs(reference_logits(head, y)).max() > 88
    loss = partial(vocab_parallel.cross_entropy, model_of(37))
    local = lambda *args: lax.psum(loss(*args), "data")  # noqa: E731
    run = over(open_mesh(MeshConfig(pipe=2)), local, (HEAD_SPECS, DATA, DATA), ALL)
    value = run(head._replace(table_VD=pad(head.table_VD, 2)), y, targets)
    reference.assert_close(value, reference_loss(head, y, targets), TOLERANCE)


@pytest.mark.parametrize("vocab_size", [37, 5])
def test_logits_of_padding_are_the_least(vocab_size: int) -> None:
    head, y, _ = draw(vocab_size)
    padded = head._replace(table_VD=pad(head.table_VD, 4))
    local = partial(vocab_parallel.logits, model_of(vocab_size))
    specs = HEAD_SPECS, ALL
    got = over(open_mesh(MeshConfig(pipe=4)), local, specs, PartitionSpec(None, "pipe"))(
        padded, y[0]
    )
    reference.assert_close(got[:, :vocab_size], reference_logits(head, y[0]), TOLERANCE)
    assert got.shape[1] > vocab_size
    assert (got[:, vocab_size:] < -1e9).all()


@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("config", MESHES, ids=str)
def test_embedding_equals_plain_jax(config: MeshConfig, vocab_size: int) -> None:
    check_embedding(config, vocab_size)


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 36])
def test_tiles_of_the_embedding_change_nothing(
    monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    monkeypatch.setattr(vocab_parallel, "TILE_TOKENS", num_tokens)
    check_embedding(MeshConfig(pipe=2), 37)


def check_embedding(config: MeshConfig, vocab_size: int) -> None:
    def local(params: Params, tokens: Array, d_x: Array) -> tuple[Array, Params]:
        x = vocab_parallel.embed(params, tokens, jnp.float32)
        return x, lax.psum(embed_grads(params, tokens, at_stage(0, d_x)), "data")

    random = np.random.default_rng(vocab_size)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
    params = {"tokens": normal(vocab_size, D), "positions": normal(T + 3, D)}
    tokens, d_x = jnp.asarray(random.integers(0, vocab_size, (B, T))), normal(B, T, D)
    padded = params | {"tokens": pad(params["tokens"], config.pipe)}
    run = over(open_mesh(config), local, (EMBED_SPECS, DATA, DATA), (DATA, EMBED_SPECS))
    x, d_params = run(padded, tokens, d_x)

    def plain(params: Params) -> Array:
        return params["tokens"][tokens] + params["positions"][:T]

    want_x, vjp = jax.vjp(plain, params)
    np.testing.assert_array_equal(x, want_x)
    got = d_params | {"tokens": d_params["tokens"][:vocab_size]}
    reference.assert_close(got, vjp(d_x)[0], TOLERANCE)
    np.testing.assert_array_equal(d_params["tokens"][vocab_size:], 0)


@pytest.mark.parametrize("function", [vocab_parallel.cross_entropy, cross_entropy_and_grads])
def test_logits_are_never_whole_in_memory(function: Any) -> None:
    num_tokens, vocab_size = 32 * 1024, 2048
    model = model_of(vocab_size)
    y = jax.ShapeDtypeStruct((1, num_tokens, D), jnp.float32)
    targets = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)
    vector = jax.ShapeDtypeStruct((D,), jnp.float32)
    table = jax.ShapeDtypeStruct((vocab_size, D), jnp.float32)
    head = Head({"scale": vector, "bias": vector}, table)

    def local(*inputs: Array) -> Any:
        if function is vocab_parallel.cross_entropy:
            return lax.psum(vocab_parallel.cross_entropy(model, *inputs), "data")
        value, d_head, d_y = cross_entropy_and_grads(model, *inputs)
        return *lax.psum((value, d_head), "data"), d_y[None]

    d_y_spec = PartitionSpec("pipe", "data")
    out_specs = ALL if function is vocab_parallel.cross_entropy else (ALL, HEAD_SPECS, d_y_spec)
    run = over(open_mesh(MeshConfig()), local, (HEAD_SPECS, DATA, DATA), out_specs)
    memory = run.lower(head, y, targets).compile().memory_analysis()
    assert memory.temp_size_in_bytes < num_tokens * vocab_size * 4 / 8
