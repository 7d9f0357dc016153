"""What a tick does, read off training steps of which it is known."""

from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from support import runs
from tpipe_jax.config.settings import (
    Config,
    MemoryConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    TrainConfig,
)
from tpipe_jax.devices.hlo import read
from tpipe_jax.devices.scopes import ON_ALL
from tpipe_jax.pipeline.spec import spec_on_devices
from tpipe_jax.pipeline.tick_program import TickProgram, large_copies, read_tick
from tpipe_jax.planning.schedule import make_schedule
from tpipe_jax.planning.settings import read_settings
from tpipe_jax.training import prepare
from tpipe_jax.training.memory import compile_step
from tpipe_jax.training.optimizer import make_optimizer

T, D = 256, 64
ITEM_BYTES = 4 * D  # of a token, in float32


def make(data: int, pipe: int, model: int, token_slices: str, remat: str = "dots") -> Any:
    """The spec and schedule of two layers a stage."""
    config = Config(
        model=ModelConfig(2 * pipe, D, 4, vocab_size=128, seq_len=T),
        mesh=MeshConfig(data, pipe, model),
        plan=PlanConfig(token_slices, "1,1", schedule="terapipe"),
        train=TrainConfig(batch_size=2 * data),
        memory=MemoryConfig(remat=remat),
    )
    spec = spec_on_devices(config, jax.devices()[: config.mesh.num_devices])
    return spec, make_schedule(read_settings(spec.config))


@cache
def text(data: int, pipe: int, model: int, token_slices: str, remat: str = "dots") -> str:
    """Its training step, in CPU's code."""
    spec, schedule = make(data, pipe, model, token_slices, remat)
    return compile_step(spec, schedule, make_optimizer(spec.config)).as_text()


def tick(*args: object, **kw: object) -> TickProgram:
    found = read_tick(text(*args, **kw), num_layers=2)
    assert found
    return found


@pytest.mark.slow
def test_stages_hand_on_slices_and_share_operators():
    """A layer has two sums in each direction. Each direction has one transfer. Devices that share
    operators send a part each, and put the parts together.
    """
    alone, divided = tick(1, 2, 1, "128,128"), tick(1, 2, 2, "128,128")
    assert alone.exchanges == {"collective-permute": (2, 2 * 128 * ITEM_BYTES)}
    number, num_bytes = divided.exchanges["all-reduce"]
    assert divided.exchanges == {
        "collective-permute": (2, 2 * 64 * ITEM_BYTES),
        "all-gather": (2, 2 * 128 * ITEM_BYTES),
        "all-reduce": (number, num_bytes),
    }
    assert number in (8, 9)  # XLA may sum a bias apart
    assert num_bytes >= 8 * 128 * ITEM_BYTES
    assert tick(1, 1, 1, "128,128").exchanges == {}


@pytest.mark.slow
def test_losses_and_gradients_are_apart():
    found = tick(2, 2, 1, "128,128")
    assert set(found.part_exchanges) == {"all-reduce"}  # of embedding, logits and hidden states
    # Gradients are summed over data, and parameters gathered, since their update is divided.
    assert set(found.step_exchanges) == {"all-gather", "all-reduce"}
    assert (
        found.step_exchanges["all-reduce"][1]
        > tick(1, 2, 1, "128,128").step_exchanges["all-reduce"][1]
    )


@pytest.mark.slow
def test_of_several_lengths_one_slice_is_in_a_tick():
    found = tick(1, 2, 2, "128,64,64").exchanges
    assert found["collective-permute"] == (2, 2 * 64 * ITEM_BYTES)
    assert found["all-reduce"][0] == tick(1, 2, 2, "128,128").exchanges["all-reduce"][0]


def test_kernels_of_a_layer():
    """Recomputation adds to the backward pass only, with another loop over the context."""
    dots, full = tick(1, 2, 1, "128,128"), tick(1, 2, 1, "128,128", remat="full")
    for found in (dots.kernels, full.kernels):
        assert 10 < found.forward < found.backward < 300
        assert 0 < found.forward_context < found.backward_context
    assert full.kernels.forward <= dots.kernels.forward
    assert full.kernels.backward > dots.kernels.backward
    assert full.kernels.backward_context > dots.kernels.backward_context
    assert read_tick(text(1, 2, 1, "128,128"), num_layers=1).kernels.forward == pytest.approx(
        2 * dots.kernels.forward, abs=1
    )


def test_no_buffer_is_copied_in_a_tick():
    """But for packets, and keys and values of a slice, which are put heads first."""
    most = (5 + 2 * 4) * 16 * ITEM_BYTES  # of two layers, in both directions
    assert most < 2 * T * ITEM_BYTES // 2
    for slices in ("16," * 15 + "16", "16," * 15 + "8,8"):
        assert tick(1, 2, 1, slices).copied_bytes < most


def test_a_program_without_ticks_has_none():
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile()
    assert read_tick(compiled.as_text(), num_layers=1) is None


def test_large_copies_are_told():
    """A copy is planted into the tick: a small one, and one as large as a buffer."""
    own, (spec, schedule) = text(1, 2, 1, "128,128"), make(1, 2, 1, "128,128")
    bodies = read(own).computations.values()
    [tick] = [body for body in bodies if any(o.source.endswith(f"/{ON_ALL}/cond") for o in body)]
    first = tick[0].name
    [line] = [line for line in own.splitlines() if line.strip().startswith(f"%{first} = ")]
    assert large_copies(own, spec, schedule) == 0
    for size, expected in ((1000, 0), (1 << 21, 8 << 20)):
        planted = own.replace(line, f"{line}\n  %planted = f32[{size}] copy(%{first})")
        found = large_copies(planted, spec, schedule)
        assert found == pytest.approx(expected, abs=400_000)
        console = runs.Lines()
        step: Any = SimpleNamespace(as_text=lambda planted=planted: planted)
        prepare._warn_of_copies(spec, schedule, step, console)
        assert len(console.said) == bool(expected)
        if expected:
            assert console.said[0].startswith("warning: each tick copies up to 9 MB, which slows")
            assert "install a newer jax" in console.said[0]
