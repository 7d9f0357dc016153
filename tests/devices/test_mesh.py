"""Devices to a mesh, and rows on it."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from tpipe_jax.config.settings import MeshConfig
from tpipe_jax.devices import mesh
from tpipe_jax.errors import UserError


def open_mesh(config: MeshConfig) -> Mesh:
    return mesh.make_mesh(config, jax.devices()[: config.num_devices])


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
@pytest.mark.parametrize(
    ("platform", "remedy"),
    [
        ("gpu", "run on CPU devices with the environment variable JAX_PLATFORMS=cpu."),
        (
            "cpu",
            "call jax.config.update('jax_num_cpu_devices', 6) before anything else uses jax, since "
            "its first use fixes their number.",
        ),
    ],
)
def test_mesh_that_does_not_fit_the_devices_is_refused(
    num_devices: int, platform: str, remedy: str
) -> None:
    devices: Any = [SimpleNamespace(platform=platform, device_kind="kind")] * num_devices
    with pytest.raises(UserError) as error:
        mesh.make_mesh(MeshConfig(data=2, pipe=3), devices)
    assert str(error.value) == (
        "config.mesh.data=2 * pipe=3 * model=1 asks for 6 devices, but there are "
        f"{num_devices} (kind): set the three so that their product is {num_devices}, or {remedy}"
    )


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
