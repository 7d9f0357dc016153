"""The pipeline around another block than GPT-2's, and with documents that do not see each other.

What it is compared with is written without caches, slices and the package's own attention.
"""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from support import reference, runs
from support.marks import slow
from support.own_blocks import LLAMA, B, T, make_config
from tpipe_jax import load
from tpipe_jax.commands.generate import Generator, chooser
from tpipe_jax.config.settings import (
    BUILT_IN,
    IGNORE,
    Config,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    PrecisionConfig,
    TrainConfig,
)
from tpipe_jax.devices.mesh import make_mesh, shardings
from tpipe_jax.errors import UserError
from tpipe_jax.interop import convert
from tpipe_jax.model import reference as plain_model
from tpipe_jax.model import transformer
from tpipe_jax.model.flops import forward_flops
from tpipe_jax.model.functional import block_functions, heads
from tpipe_jax.model.sharding import check_model, param_specs
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.training.step import make_loss, make_loss_and_grads

Params = Any
TOLERANCE = 1e-5

MESHES = [slow(MeshConfig()), slow(MeshConfig(pipe=2)), MeshConfig(data=2, pipe=2, model=2)]


def llama_layer(params: Params, x_TD: Array, num_heads: int) -> Array:
    """One layer on one document, token by token and head by head where that is simplest."""

    def norm(name: str, x: Array) -> Array:
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * params[name]["scale"]

    def linear(name: str, x: Array) -> Array:
        return x @ params[name]["kernel"]

    num_tokens, D = x_TD.shape
    K = D // num_heads
    # A rotation of pairs of numbers is a product with a complex number.
    angles = np.arange(num_tokens)[:, None] * 10000.0 ** (-np.arange(0, K, 2) / K)
    turn = jnp.exp(1j * angles)

    def rotated(a_TK: Array) -> Array:
        turned = (a_TK[:, : K // 2] + 1j * a_TK[:, K // 2 :]) * turn
        return jnp.concatenate([turned.real, turned.imag], -1)

    normed = norm("norm_1", x_TD)
    q, k, v = (linear(name, normed) for name in "qkv")
    outs = []
    for head in range(num_heads):
        own, shared = (slice(h * K, h * K + K) for h in (head, head // 2))
        score = rotated(q[:, own]) @ rotated(k[:, shared]).T / np.sqrt(K)
        score = jnp.where(np.tri(num_tokens, dtype=bool), score, -jnp.inf)
        outs.append(jax.nn.softmax(score) @ v[:, shared])
    middle = x_TD + linear("o", jnp.concatenate(outs, -1))
    normed = norm("norm_2", middle)
    gate = linear("gate", normed)
    return middle + linear("down", gate * jax.nn.sigmoid(gate) * linear("up", normed))


def document_logits(config: ModelConfig, params: Params, tokens_T: Array) -> Array:
    """The model on one document."""
    if config.block != LLAMA:
        return plain_model.logits(config, params, tokens_T[None])[0]
    x = params["embed"]["tokens"][tokens_T] + params["embed"]["positions"][: len(tokens_T)]
    for layer in params["blocks"]:
        x = llama_layer(layer, x, config.num_heads)
    return transformer.final_norm(config, params["norm"], x) @ params["embed"]["tokens"].T


def expected_loss(config: ModelConfig, rows_B3T: np.ndarray, params: Params) -> Array:
    """The mean over the targets that count, each document by itself."""
    total, count = jnp.float32(0), 0
    for tokens, targets, starts in rows_B3T:
        for start in np.unique(starts):
            own = np.flatnonzero(starts == start)
            wanted, counts = targets[own], targets[own] != IGNORE
            log_probs = jax.nn.log_softmax(document_logits(config, params, jnp.array(tokens[own])))
            total -= log_probs[np.arange(len(own)), np.where(counts, wanted, 0)] @ counts
            count += int(counts.sum())
    return total / count


def draw_rows(is_apart: bool) -> np.ndarray:
    """Rows `[B, 3, T]`: documents that end within slices and blocks, or where they do, and of one
    token; some targets don't count.
    """
    random = np.random.default_rng(0)
    bounds = [[0, 5, 9, 10], [0, 17]]
    starts = np.zeros((B, T), np.int32)
    for row, own in zip(starts, bounds, strict=True):
        for start in own if is_apart else []:
            row[start:] = start
    tokens, targets = random.integers(0, 29, (2, B, T))
    if is_apart:
        targets[random.random((B, T)) < 0.2] = IGNORE
    else:  # as a window of tokens has them
        targets[:, :-1] = tokens[:, 1:]
    return np.stack([tokens, targets, starts], 1).astype(np.int32)


def drawn_params(config: ModelConfig) -> Params:
    """Larger than at the start of training, so that attention attends to something."""
    params = transformer.init(config, jax.random.key(1))
    params["embed"] = jax.tree.map(lambda a: 20 * a, params["embed"])
    if config.block == BUILT_IN:
        params["blocks"] = jax.tree.map(lambda a: 4 * a, params["blocks"])
    return params


@cache
def expected_loss_and_grads(block: str, is_apart: bool) -> tuple[Array, Params]:
    config, rows = make_config(block, MeshConfig()).model, draw_rows(is_apart)
    value_and_grad = jax.jit(jax.value_and_grad(partial(expected_loss, config, rows)))
    return value_and_grad(drawn_params(config))


def on_mesh(config: Config, mesh: Any, params: Params) -> Params:
    staged = reference.to_stages(params, mesh)
    specs = param_specs(config.model, len(staged["blocks"]))
    return jax.device_put(staged, shardings(mesh, specs))


def loss_and_grads(config: Config, rows: np.ndarray) -> tuple[float, float, Params]:
    """The loss alone, with gradients, and these as the model has them."""
    mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.num_devices])
    schedule = make_schedule(reference.plan_of(config))
    params = on_mesh(config, mesh, drawn_params(config.model))
    value, grads = make_loss_and_grads(make_spec(config, mesh), schedule)(params, rows)
    alone = make_loss(make_spec(config, mesh), schedule)(params, rows)
    grads = jax.tree.map(np.asarray, grads)
    return float(alone), float(value), reference.from_stages(grads, 2, 29)


@pytest.mark.parametrize(
    ("block", "is_apart"),
    [slow(BUILT_IN, True), (LLAMA, True), slow(LLAMA, False)],
    ids=["gpt2, documents", "llama, documents", "llama"],
)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_is_the_same_as_without_a_pipeline(block: str, mesh: MeshConfig, is_apart: bool):
    config = make_config(block, mesh, is_apart)
    rows = draw_rows(is_apart)
    plain = np.concatenate([rows[:, 0], rows[:, 1, -1:]], 1)
    expected = expected_loss_and_grads(block, is_apart)
    alone, value, grads = loss_and_grads(config, rows if is_apart else plain)
    assert value == pytest.approx(float(expected[0]), rel=1e-6)
    assert alone == pytest.approx(value, rel=1e-6)
    reference.assert_close(grads, expected[1], TOLERANCE)


@pytest.mark.slow
def test_documents_that_follow_each_other_in_the_same_rows():
    """Six sequences, which are two, three times, in the rows of three."""
    config = make_config(LLAMA, MeshConfig(pipe=2), is_apart=True)
    plan, train = PlanConfig("uniform:3", "uniform:6", schedule="1f1b"), TrainConfig(batch_size=6)
    config = replace(config, plan=plan, train=train)
    assert make_schedule(reference.plan_of(config)).num_rows == 3
    alone, value, grads = loss_and_grads(config, np.tile(draw_rows(is_apart=True), (3, 1, 1)))
    expected = expected_loss_and_grads(LLAMA, is_apart=True)
    assert (value, alone) == pytest.approx((float(expected[0]),) * 2, rel=1e-6)
    reference.assert_close(grads, expected[1], TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "memory"),
    [
        (LLAMA, MemoryConfig(remat="full")),
        (LLAMA, MemoryConfig(remat="none")),
        (BUILT_IN, MemoryConfig(remat="full")),
        (BUILT_IN, MemoryConfig(remat="dots", defer_weight_grads=True)),
    ],
    ids=["llama-full", "llama-none", "gpt2-full", "gpt2-deferred"],
)
def test_whatever_is_saved_gives_the_same_gradients(block: str, memory: MemoryConfig):
    config = make_config(block, MeshConfig(pipe=2), is_apart=True, memory=memory)
    _, value, grads = loss_and_grads(config, draw_rows(is_apart=True))
    expected = expected_loss_and_grads(block, is_apart=True)
    assert value == pytest.approx(float(expected[0]), rel=1e-6)
    reference.assert_close(grads, expected[1], TOLERANCE)


@pytest.mark.slow
def test_a_short_format_is_near():
    """Gradients of parameters that are no `linears` are rounded to bfloat16 (2^-9) by slices."""
    short = PrecisionConfig(compute="bfloat16")
    config = make_config(LLAMA, MeshConfig(pipe=2), is_apart=True, precision=short)
    _, value, grads = loss_and_grads(config, draw_rows(is_apart=True))
    expected = expected_loss_and_grads(LLAMA, is_apart=True)
    assert value == pytest.approx(float(expected[0]), rel=0.01)
    reference.assert_close(grads, expected[1], 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(pipe=2)], ids=str)
def test_greedy_text_is_that_of_the_whole_model(mesh: MeshConfig):
    config = make_config(LLAMA, mesh)
    devices = make_mesh(mesh, jax.devices()[: mesh.num_devices])
    params = drawn_params(config.model)
    generator = Generator(make_spec(config, devices), on_mesh(config, devices, params))
    tokens = [3, 1, 4, 1, 5]
    following = generator.tokens_after([*tokens], chooser(0))
    for _ in range(8):
        logits = document_logits(config.model, params, jnp.array(tokens))
        tokens.append(int(logits[-1].argmax()))
        assert next(following) == tokens[-1]


def test_shapes_and_operations_of_a_block():
    config = make_config(LLAMA, MeshConfig()).model
    assert heads(config) == (4, 2, 4)
    D, F, pairs = 16, 64, 5 * 7 + 5 * 6 // 2
    matrices = 2 * D * D + 2 * D * D // 2 + 3 * D * F
    assert forward_flops(config, 5, 7) == 2 * 5 * matrices + 4 * D * pairs
    assert block_functions(config, jnp.dtype(jnp.float32)).linears == {}


DECLARED = """
from pathlib import Path

from flax import nnx
from jax.sharding import PartitionSpec as P

from tpipe_jax.model.block import merge_heads
from tpipe_jax.config.user_code import load_file

columns, rows = {"kernel": P(None, "model")}, {"kernel": P("model")}


class Declared(load_file(Path(LLAMA)).LlamaBlock):
    linears = {
        "o": ("attn", "middle"),
        "gate": ("norm_2", "gate"),
        "up": ("norm_2", "hidden"),
        "down": ("gelu", "out"),
    }
    specs = {name: columns for name in ("q", "k", "v", "gate", "up")}
    specs |= {"o": rows, "down": rows, "norm_1": {"scale": P()}, "norm_2": {"scale": P()}}

    def finish(self, x, attn, tape):
        middle = tape("middle", x + self.o(tape("attn", merge_heads(attn))))
        normed = tape("norm_2", self.norm_2(middle).astype(self.dtype))
        gate = tape("gate", self.gate(normed))
        hidden = tape("hidden", self.up(normed))
        return tape("out", middle + self.down(tape("gelu", nnx.silu(gate) * hidden)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "memory"),
    [
        (MeshConfig(pipe=2, model=2), MemoryConfig(remat="dots")),
        (MeshConfig(pipe=2), MemoryConfig(remat="dots", defer_weight_grads=True)),
    ],
    ids=["divided", "deferred"],
)
def test_a_block_says_what_its_linear_layers_are(
    tmp_path: Path, mesh: MeshConfig, memory: MemoryConfig
):
    """And how they are divided; gradients are those of the block that says nothing."""
    file = tmp_path / "declared.py"
    file.write_text(DECLARED.replace("LLAMA", repr(LLAMA.rpartition(":")[0])))
    config = make_config(f"{file}:Declared", mesh, is_apart=True, memory=memory)
    check_model(config.model, mesh)
    _, value, grads = loss_and_grads(config, draw_rows(is_apart=True))
    expected = expected_loss_and_grads(LLAMA, is_apart=True)
    assert value == pytest.approx(float(expected[0]), rel=1e-6)
    reference.assert_close(grads, expected[1], TOLERANCE)


ABSOLUTE = """
from pathlib import Path

import jax.numpy as jnp

from tpipe_jax.config.user_code import load_file


class Absolute(load_file(Path(LLAMA)).LlamaBlock):
    def qkv(self, x, positions, tape):
        return super().qkv(x + 0.1 * positions[..., None].astype(x.dtype), positions, tape)

    def finish(self, x, attn, tape):
        return super().finish(jnp.tanh(tape("attn", x)), attn, tape)
"""


@pytest.mark.slow
def test_positions_are_those_in_the_document(tmp_path: Path):
    """Which rotary ones cannot tell. And a value that is called as one of the stage's is not taken
    for it.
    """
    file = tmp_path / "absolute.py"
    file.write_text(ABSOLUTE.replace("LLAMA", repr(LLAMA.rpartition(":")[0])))
    block = f"{file}:Absolute"
    _, value, grads = loss_and_grads(make_config(block, MeshConfig(pipe=2), True), draw_rows(True))
    expected = expected_loss_and_grads(block, is_apart=True)
    assert value == pytest.approx(float(expected[0]), rel=1e-6)
    reference.assert_close(grads, expected[1], TOLERANCE)


@pytest.mark.slow
def test_a_run_with_another_block(tmp_path: Path):
    """Trains, continues on another mesh, samples, and is not mistaken for a GPT-2."""
    config = runs.changed(runs.small_config(tmp_path), model={"block": LLAMA, "num_heads": 4})
    runs.run(runs.changed(config, train={"num_steps": 3}), tmp_path / "run")
    said = runs.run(runs.changed(config, mesh={"pipe": 3}), tmp_path / "run")
    assert "continuing after step 3" in said
    losses = [line["loss"] for line in runs.metrics(tmp_path / "run")]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    trained = load(tmp_path / "run", config=Config(config.model)).trained
    assert (trained.step, trained.config.model.block) == (6, LLAMA)
    with pytest.raises(UserError, match=r"has layers of config\.model\.block=.*LlamaBlock, which"):
        convert.export_model(tmp_path / "run", tmp_path / "out", None)
    assert not (tmp_path / "out").exists()
