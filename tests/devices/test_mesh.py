import os
import platform
import subprocess
import sys
import textwrap
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import chex
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

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


def test_mesh_has_its_devices_in_the_order_data_pipe_model() -> None:
    devices = jax.devices()
    got = mesh.make_mesh(MeshConfig(data=2, pipe=1, model=4), devices)
    assert got.axis_names == ("data", "pipe", "model")
    assert got.devices.shape == (2, 1, 4)
    assert set(got.devices.flat) == set(devices)
    assert got.axis_types == (AxisType.Auto,) * 3


class Place(NamedTuple):
    """Stands for a device: only its place counts."""

    id: int
    process_index: int
    slice_index: int = 0


def processes_of(order: str, devices: list[Place]) -> np.ndarray:
    """The process of each device in a mesh of two data shards, stages and shares of operators."""
    placed = mesh.place_devices(MeshConfig(2, 2, 2, order), devices)
    return np.vectorize(lambda device: device.process_index)(placed)


def test_devices_of_a_host_share_operators_and_stages_go_across_hosts() -> None:
    """Devices come in any order; ids do not follow the processes."""
    devices = [Place(id=(3 * n) % 8, process_index=n // 2) for n in (5, 2, 7, 0, 3, 6, 1, 4)]
    got = processes_of("pipe,data,model", devices)  # [data, pipe, model]
    np.testing.assert_array_equal(got, [[[0, 0], [2, 2]], [[1, 1], [3, 3]]])
    got = processes_of("data,pipe,model", devices)
    np.testing.assert_array_equal(got, [[[0, 0], [1, 1]], [[2, 2], [3, 3]]])
    got = processes_of("model,data,pipe", devices)
    np.testing.assert_array_equal(got, [[[0, 2], [0, 2]], [[1, 3], [1, 3]]])


def test_processes_that_a_fast_network_joins_are_neighbours() -> None:
    devices = [Place(n, process_index=n, slice_index=n % 2) for n in range(8)]
    got = processes_of("pipe,data,model", devices)
    np.testing.assert_array_equal(got[:, 0] % 2, np.zeros((2, 2)))  # one stage in each slice
    np.testing.assert_array_equal(got[:, 1] % 2, np.ones((2, 2)))


def test_hosts_have_their_part_of_the_mesh() -> None:
    devices = [Place(n, process_index=n // 2) for n in range(8)]
    for order, parts, spans in (
        ("pipe,data,model", [([0, 1], 4, [0], [0, 1]), ([2, 3], 4, [1], [0, 1])], False),
        ("data,pipe,model", [([0, 1], 4, [0, 1], [0]), ([2, 3], 4, [0, 1], [1])], False),
        ("model,pipe,data", [([0, 1], 4, [0, 1], [0, 1]), ([2, 3], 4, [0, 1], [0, 1])], True),
    ):
        placed = SimpleNamespace(devices=mesh.place_devices(MeshConfig(2, 2, 2, order), devices))
        hosts = ["a", "a", "b", "b"]
        got = mesh.host_parts(placed, hosts)  # pyrefly: ignore[bad-argument-type]
        assert got == [("a", *parts[0]), ("b", *parts[1])]
        assert mesh.operators_span_hosts(placed, hosts) == spans  # pyrefly: ignore


@pytest.mark.parametrize("num_devices", [5, 8])
def test_mesh_that_does_not_fit_the_devices_is_refused(num_devices: int) -> None:
    with pytest.raises(UserError) as error:
        mesh.make_mesh(MeshConfig(data=2, pipe=3), jax.devices()[:num_devices])
    assert str(error.value) == (
        "config.mesh.data=2 * pipe=3 * model=1 asks for 6 devices, but there are "
        f"{num_devices} (cpu): set the three so that their product is {num_devices}, "
        "or run on CPU devices with the environment variable JAX_PLATFORMS=cpu."
    )


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


def test_model_is_left_out_of_manual_specs() -> None:
    spec = PartitionSpec
    specs = {
        "tokens": spec(("pipe", "model")),
        "kernel": spec("pipe", None, "model"),
        "positions": spec(),
        "rows": [spec("data"), spec(("data", "pipe"), "model")],
    }
    assert mesh.manual_part(specs) == {
        "tokens": spec("pipe"),
        "kernel": spec("pipe", None, None),
        "positions": spec(),
        "rows": [spec("data"), spec(("data", "pipe"), None)],
    }


def test_every_stage_of_a_data_shard_has_its_rows() -> None:
    rows = np.arange(12, dtype=np.int32).reshape(4, 3)
    devices = open_mesh(MeshConfig(data=2, pipe=2, model=2))
    placed = mesh.put_rows(devices, rows)
    np.testing.assert_array_equal(placed, rows)
    assert placed.dtype == rows.dtype
    shards = {shard.device: np.asarray(shard.data) for shard in placed.addressable_shards}
    for data in range(2):
        for device in devices.devices[data].flat:
            np.testing.assert_array_equal(shards[device], rows[2 * data : 2 * data + 2])


def test_rows_of_a_data_shard_are_read_once_for_all_its_devices() -> None:
    rows = np.arange(12, dtype=np.uint16).reshape(4, 3)
    devices = open_mesh(MeshConfig(data=4, pipe=2))
    asked = []

    def read(wanted: slice) -> np.ndarray:
        asked.append((wanted.start, wanted.stop, wanted.step))
        return rows[wanted]

    placed = mesh.put_read_rows(devices, read, rows.shape, rows.dtype)
    np.testing.assert_array_equal(placed, rows)
    assert placed.dtype == rows.dtype
    assert sorted(asked) == [(0, 1, 1), (1, 2, 1), (2, 3, 1), (3, 4, 1)]


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        (("pipe", None, "model"), (2, 8, 8), ("pipe", "data", "model")),
        (("pipe", None, "model"), (2, 6, 8), ("pipe", None, ("model", "data"))),
        (("pipe", "model"), (2, 8), ("pipe", ("model", "data"))),
        (("pipe", "model"), (2, 4), ("pipe", "model")),  # what model has is too few for data
        ((("pipe", "model"),), (8, 4), (("pipe", "model"), "data")),
        (("pipe",), (8, 8), ("pipe", "data")),  # an axis that is whole comes first
        ((), (3, 8), (None, "data")),
        ((), (), ()),
    ],
)
def test_data_shards_divide_an_axis_where_one_lets_them(
    spec: tuple, shape: tuple[int, ...], expected: tuple
) -> None:
    devices = SimpleNamespace(shape={"data": 4, "pipe": 2, "model": 2})
    got = mesh.over_data(devices, PartitionSpec(*spec), shape)  # pyrefly: ignore
    assert got == PartitionSpec(*expected)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what other C libraries do is theirs")
def test_freed_memory_is_kept():
    """A buffer that is freed and allocated again does not fault its pages in again."""
    program = """
        import ctypes, resource, sys
        from tpipe_jax.devices.startup import prepare_cpu
        if sys.argv[1] == "keep":
            prepare_cpu(1)
        libc, faults = ctypes.CDLL(None), []
        libc.malloc.restype = ctypes.c_void_p
        for _ in range(3):
            buffer = ctypes.c_void_p(libc.malloc(2**26))
            ctypes.memset(buffer, 1, 2**26)
            libc.free(buffer)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        print(faults[2] - faults[1])
    """

    def faults(what: str) -> int:
        command = [sys.executable, "-c", textwrap.dedent(program), what]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    assert faults("keep") < 100
    assert faults("give back") > 1000


def flags_after(num_devices: int, before: str) -> list[str]:
    """XLA's flags in a process that prepares for so many devices, and that XLA takes them."""
    program = """
        import os, sys
        from tpipe_jax.devices.startup import prepare_cpu
        prepare_cpu(int(sys.argv[1]))
        import jax
        assert jax.numpy.ones(3).sum() == 3
        print(os.environ["XLA_FLAGS"])
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(num_devices)]
    environment = os.environ | {"XLA_FLAGS": before}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_flags_of_the_user_come_last_and_count():
    num_cores = len(os.sched_getaffinity(0))
    flags = flags_after(num_cores, "--xla_cpu_multi_thread_eigen=true")
    assert flags == [
        "--xla_cpu_experimental_ynn_fusion_type=-reduce",
        "--xla_cpu_copy_insertion_use_region_analysis=true",
        "--xla_cpu_multi_thread_eigen=false",
        "--xla_cpu_multi_thread_eigen=true",
    ]
    assert flags_after(num_cores - 1, "") == flags[:2]
