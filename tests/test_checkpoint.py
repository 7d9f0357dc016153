import logging
import resource
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpipe_jax.checkpoint import Checkpoints
from tpipe_jax.config import CheckpointConfig, UserError

IDENTITY = {"model": {"d_model": 128, "d_ff": None}, "mesh": {"pipe": 2}}


@pytest.fixture(params=[1, 2], ids=["1 device", "2 devices"])
def mesh(request: pytest.FixtureRequest) -> Mesh:
    if len(jax.devices()) < request.param:
        pytest.skip(f"needs {request.param} devices, there is {len(jax.devices())}")
    return Mesh(np.array(jax.devices()[: request.param]), ("pipe",))


def make_state(mesh: Mesh, seed: int = 0) -> dict[str, Any]:
    """Parameters and AdamW's state as in training: tuples of named tuples, some of them empty."""
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "split": jax.random.normal(keys[0], (4, 6)),
        "same": jax.random.normal(keys[1], (3,), jnp.bfloat16),
        "nested": (jax.random.normal(keys[2], (2, 5)), [jnp.float32(1 / 3)]),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    updates, opt_state = optimizer.update(params, optimizer.init(params), params)
    state = {
        "params": optax.apply_updates(params, updates),
        "optimizer": opt_state,
        "step": jnp.int32(7),
    }

    def place(x: jax.Array) -> jax.Array:
        spec = PartitionSpec("pipe") if x.shape == (4, 6) else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def like(state: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def on_host(state: Any) -> Any:
    return jax.tree.map(lambda x: np.array(x, copy=True), state)


def assert_bitwise_equal(restored: Any, saved: Any) -> None:
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    for a, b in zip(
        jax.tree.leaves(on_host(restored)), jax.tree.leaves(on_host(saved)), strict=True
    ):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def open_folder(folder: Path, keep: int = 2, identity: dict[str, Any] = IDENTITY) -> Any:
    return closing(Checkpoints(folder, CheckpointConfig(keep=keep), identity))


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file of this process may grow beyond `room` bytes; works for root too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_restores_what_was_saved_bit_by_bit(tmp_path: Path, mesh: Mesh) -> None:
    state = make_state(mesh)
    with open_folder(tmp_path / "new" / "checkpoints") as checkpoints:
        checkpoints.save(7, state)
    with open_folder(tmp_path / "new" / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 7
        step, restored = checkpoints.newest_step(), checkpoints.restore(like(state))
    assert step == 7
    assert_bitwise_equal(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, state)


def test_restores_onto_the_shardings_of_like(tmp_path: Path, mesh: Mesh) -> None:
    state = make_state(mesh)
    last_axis = NamedSharding(mesh, PartitionSpec(None, "pipe"))
    wanted = like(state)
    wanted["params"]["split"] = jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=last_axis)
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        restored = checkpoints.restore(wanted)
    assert restored["params"]["split"].sharding == last_axis
    assert_bitwise_equal(restored, state)


def test_state_may_be_donated_right_after_save(tmp_path: Path, mesh: Mesh) -> None:
    spread = NamedSharding(mesh, PartitionSpec("pipe"))
    step = jax.jit(lambda state: jax.tree.map(lambda x: -x - 1, state), donate_argnums=0)
    # An output of a jitted step, as in training; so large that the write outlasts the next steps.
    state = step(jax.device_put({"w": jnp.arange(2.0**21), "b": jnp.arange(8.0)}, spread))
    wanted, saved = like(state), on_host(state)
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        restored = checkpoints.restore(wanted)
    assert_bitwise_equal(restored, saved)


def test_keeps_the_newest_and_restores_the_last(tmp_path: Path, mesh: Mesh) -> None:
    states = {step: make_state(mesh, seed=step) for step in (2, 4, 10)}
    with open_folder(tmp_path) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "4"]
    with open_folder(tmp_path) as checkpoints:
        step, restored = checkpoints.newest_step(), checkpoints.restore(like(states[10]))
    assert step == 10
    assert_bitwise_equal(restored, states[10])


def test_a_step_that_is_saved_already_stays_as_it_is(tmp_path: Path, mesh: Mesh) -> None:
    first, second = make_state(mesh, seed=1), make_state(mesh, seed=2)
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(5, first)
        checkpoints.save(5, second)
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(5, second)
        assert_bitwise_equal(checkpoints.restore(like(first)), first)


def test_an_empty_folder_has_no_latest_step(tmp_path: Path) -> None:
    with open_folder(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None


def test_half_written_checkpoint_is_ignored_and_removed(tmp_path: Path, mesh: Mesh) -> None:
    state = make_state(mesh)
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.save(3, state)
    (tmp_path / "3").rename(tmp_path / "3.orbax-checkpoint-tmp")
    with open_folder(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        checkpoints.save(2, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_names_each_setting_of_another_model(tmp_path: Path, mesh: Mesh) -> None:
    state = make_state(mesh)
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    other = {"model": {"d_model": 192, "d_ff": None}, "mesh": {"pipe": 4}}
    unreadable = {"params": like(state["params"])}  # the arrays must not be looked at before
    with open_folder(tmp_path, identity=other) as checkpoints, pytest.raises(UserError) as caught:
        checkpoints.restore(unreadable)
    assert str(caught.value) == (
        f"the checkpoint in {tmp_path} was written with config.model.d_model=128, but this run has "
        "192; with config.mesh.pipe=2, but this run has 4: use the same settings, or start another "
        "run with --workdir."
    )


@pytest.mark.parametrize(
    "files", ["identity/metadata", "state/_METADATA", "state/d/*", "state/ocdbt*/d/*"]
)
def test_damaged_checkpoint_is_named(
    tmp_path: Path, mesh: Mesh, files: str, capfd: pytest.CaptureFixture[str]
) -> None:
    state = make_state(mesh)
    large = jax.device_put(jnp.arange(10_000.0), NamedSharding(mesh, PartitionSpec()))
    state["params"] = {f"layer {i}": large + i for i in range(5)}
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(3, state)
    damaged = list((tmp_path / "3").glob(files))
    assert damaged
    for path in damaged:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    sentence = f"the checkpoint in {tmp_path}/3 cannot be read"
    with open_folder(tmp_path) as checkpoints, pytest.raises(UserError, match=sentence):
        checkpoints.restore(like(state))
    assert capfd.readouterr().err == ""


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        UserError, match=r"cannot write checkpoints to .*/file/checkpoints .*--workdir"
    ):
        Checkpoints(tmp_path / "file" / "checkpoints", CheckpointConfig(), IDENTITY)


def test_folder_that_vanished_fails_at_once(tmp_path: Path, mesh: Mesh) -> None:
    with open_folder(tmp_path / "checkpoints") as checkpoints:
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").write_text("in the way")
        with pytest.raises(
            UserError, match=r"cannot write checkpoints to .*/checkpoints .*--workdir"
        ):
            checkpoints.save(1, make_state(mesh))


def test_folder_without_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # chmod does not stop root
    with pytest.raises(
        UserError, match=r"cannot write checkpoints to .*permission denied.*--workdir"
    ):
        Checkpoints(tmp_path, CheckpointConfig(), IDENTITY)


def test_full_disk_is_reported_and_the_step_does_not_count(
    tmp_path: Path, mesh: Mesh, capfd: pytest.CaptureFixture[str]
) -> None:
    state = make_state(mesh)
    with open_folder(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        with full_disk(room=600):
            checkpoints.save(2, state)
            with pytest.raises(
                UserError, match=f"cannot write checkpoints to {tmp_path} .*--workdir"
            ):
                checkpoints.wait()
        assert checkpoints.latest_step() == 1
        checkpoints.save(3, state)
        assert checkpoints.latest_step() == 3
    assert capfd.readouterr().err == ""


def test_logs_no_progress(tmp_path: Path, mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    state = make_state(mesh)
    with caplog.at_level(logging.INFO):
        with open_folder(tmp_path) as checkpoints:
            checkpoints.save(1, state)
            checkpoints.restore(like(state))
        logging.getLogger("absl").info("of another library")
        # asyncio's own words for a write that Orbax has dropped, which come when it is collected.
        logging.getLogger("asyncio").error("Future exception was never retrieved\nfuture: <...>")
        logging.getLogger("asyncio").error("another error")
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["of another library", "another error"]
