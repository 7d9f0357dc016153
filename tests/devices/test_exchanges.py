"""What devices exchange, read from compiled programs whose exchanges are known."""

import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpipe_jax.config.settings import MeshConfig
from tpipe_jax.devices.collectives import varying
from tpipe_jax.devices.exchanges import (
    Collective,
    check_branches,
    compile_checked,
    find_collectives,
)
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.devices.scopes import PUT, SLICE
from tpipe_jax.devices.skips import CONDITIONALS, Skips, skips_on
from tpipe_jax.errors import UserError

CONFIG = MeshConfig(data=2, pipe=2, model=2)


@pytest.fixture
def mesh() -> Mesh:
    return make_mesh(CONFIG, jax.devices())


def staged(mesh: Mesh, local: Callable[[Array, Array], Array], **options: Any) -> Any:
    """A function of all devices, with 'model' left to GSPMD, and arguments that lie where they do
    in a step: what is worked on by data shard, and a matrix that 'model' divides.
    """
    run = jax.shard_map(
        local,
        mesh=mesh,
        axis_names={"data", "pipe"},
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec(("data", "pipe")),
        **options,
    )
    x = jax.device_put(np.ones((4, 8), np.float32), NamedSharding(mesh, PartitionSpec("data")))
    divided = NamedSharding(mesh, PartitionSpec(None, "model"))
    return jax.jit(run), x, jax.device_put(np.ones((8, 12), np.float32), divided)


def on_first_stage(work: Callable[[Array], Array], x: Array) -> Array:
    return lax.cond(lax.axis_index("pipe") == 0, work, lambda x: x, varying(x))


def product(x: Array, w: Array) -> Array:
    return jax.nn.relu(x @ w) @ w.T


def qkv_first(x: Array, w: Array) -> Array:
    """Columns that are ordered q/k/v first, so that 'model' divides them across the three."""
    q, k, v = jnp.moveaxis((x @ w).reshape(-1, 3, 2, 2), 1, 0)
    return x + ((q * k).sum() + v.sum())


def test_sums_within_a_stage_are_found_and_allowed(mesh: Mesh):
    run, x, w = staged(mesh, lambda x, w: on_first_stage(lambda x: product(x, varying(w)), x))
    compiled = compile_checked(run, mesh, x, w)
    [collective] = find_collectives(compiled.as_text() or "")
    assert (collective.kind, collective.in_branch) == ("all-reduce", True)
    assert collective.groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert "dot_general" in collective.name
    assert collective.stays_within(2)
    assert not collective.stays_within(1)


def test_exchanges_outside_of_branches_are_found_and_allowed(mesh: Mesh):
    def local(x: Array, w: Array) -> Array:
        x = lax.ppermute(varying(x), "pipe", [(0, 1)])
        total = lax.psum(x, "data")
        return varying(lax.psum(x, ("data", "pipe")) + total.sum())

    run, x, w = staged(mesh, local)
    text = run.lower(x, w).compile().as_text()
    check_branches(find_collectives(text), mesh)
    found = {(c.kind, c.in_branch, c.groups) for c in find_collectives(text)}
    assert found == {
        ("collective-permute", False, ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("all-reduce", False, ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("all-reduce", False, ((0, 2, 4, 6), (1, 3, 5, 7))),
    }


@pytest.mark.parametrize(
    ("exchange", "kind"),
    [
        (lambda x, w: lax.ppermute(x, "pipe", [(0, 1)]), "collective-permute"),
        (lambda x, w: lax.psum(x, "pipe"), "all-reduce"),
        (lambda x, w: lax.psum(x, "data"), "all-reduce"),
        (lambda x, w: x + lax.all_gather(x, "data").sum(0), "all-gather"),
        (qkv_first, "all-to-all|collective-permute|all-gather"),
    ],
    ids=["to the neighbour", "sum over stages", "sum over data", "gather", "divided q, k and v"],
)
def test_exchanges_that_not_all_devices_come_to_are_refused_by_name(
    mesh: Mesh, exchange: Callable[[Array, Array], Array], kind: str
):
    def local(x: Array, w: Array) -> Array:
        return on_first_stage(lambda x: varying(exchange(x, varying(w))), x)

    run, x, w = staged(mesh, local)
    with pytest.raises(UserError) as error:
        compile_checked(run, mesh, x, w)
    sentence = str(error.value)
    assert re.search(
        rf"^with config\.mesh\.model=2, XLA has put a collective \(({kind}) for", sentence
    )
    assert re.search(r"branch_1_fun|%all|%collective", sentence)  # the operation's name


def test_branches_within_loops_and_within_branches_count(mesh: Mesh):
    def local(x: Array, w: Array) -> Array:
        def inner(x: Array) -> Array:
            return lax.fori_loop(0, 3, lambda _, x: lax.psum(x, "pipe") + varying(x), x)

        def outer(x: Array) -> Array:
            return lax.cond(x.sum() > 0, lambda x: varying(inner(x)), lambda x: 2 * x, x)

        return lax.fori_loop(0, 2, lambda _, x: on_first_stage(outer, x), varying(x))

    run, x, w = staged(mesh, local)
    [collective] = find_collectives(run.lower(x, w).compile().as_text())
    assert (collective.kind, collective.in_branch) == ("all-reduce", True)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups={}", ()),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[4,2]<=[2,2,2]T(1,2,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['a'=4] {'a':(1)2}", ()),
        ("source_target_pairs={{0,2},{1,3}}", ((0, 2), (1, 3))),
    ],
)
def test_all_ways_to_write_groups_are_read(groups: str, expected: tuple):
    line = f"  %x = f32[2] all-reduce(%a), {groups}, to_apply=%f"
    text = f"ENTRY %main (a: f32[2]) -> f32[2] {{\n{line}\n}}"
    [collective] = find_collectives(text)
    assert collective.groups == expected
    assert collective.stays_within(8) == bool(expected)


@pytest.mark.parametrize("skips", [CONDITIONALS, Skips(0)], ids=["conditionals", "loops"])
def test_branches_that_all_devices_take_may_exchange(skips: Skips, mesh: Mesh):
    """And what is in a branch of theirs that only some take may not."""

    def summed(x: Array) -> Array:
        return varying(lax.psum(x, "pipe"))

    def local(function: Callable[[Array], Array], x: Array, w: Array) -> Array:
        return skips.run_on_all_if(w.sum() > 0, function, varying(x))

    run, x, w = staged(mesh, partial(local, summed))
    compiled = compile_checked(run, mesh, x, w)
    found = [c for c in find_collectives(compiled.as_text()) if "psum" in c.name]
    assert [c.in_branch for c in found] == [False]
    np.testing.assert_allclose(compiled(x, w)[0], [2] * 8)
    run, x, w = staged(mesh, partial(local, partial(on_first_stage, summed)))
    with pytest.raises(UserError, match="would hang"):
        compile_checked(run, mesh, x, w)


@pytest.mark.parametrize("scope", [SLICE, PUT])
def test_a_loop_that_only_some_stages_take_is_a_branch(scope: str, mesh: Mesh):
    def local(x: Array, w: Array) -> Array:
        with jax.named_scope(scope):
            is_first = lax.axis_index("pipe") == 0
            return Skips(0).run_if(is_first, lambda x: varying(lax.psum(x, "pipe")), varying(x))

    run, x, w = staged(mesh, local)
    with pytest.raises(UserError, match="would hang"):
        compile_checked(run, mesh, x, w)


@pytest.mark.parametrize(
    ("platform", "kind", "groups", "is_allowed"),
    [
        ("gpu", "all-reduce", ((0, 1), (2, 3)), True),
        ("gpu", "all-gather", ((0, 1), (2, 3)), False),
        ("tpu", "all-gather", ((0, 1), (2, 3)), True),
        ("tpu", "reduce-scatter", ((0, 1), (2, 3)), True),
        ("tpu", "all-gather", ((0, 2), (1, 3)), False),  # of several stages
        ("tpu", "all-gather", (), False),  # of all devices
        ("tpu", "all-to-all", ((0, 1), (2, 3)), False),
    ],
)
def test_tpus_may_divide_an_all_reduce(
    platform: str, kind: str, groups: tuple[tuple[int, ...], ...], is_allowed: bool
):
    device: Any = SimpleNamespace(platform=platform)
    of_devices: Any = SimpleNamespace(shape={"model": 2}, devices=np.array([device]))
    collective = Collective(kind, "x", groups, in_branch=True)
    if is_allowed:
        check_branches([collective], of_devices)
    else:
        with pytest.raises(UserError, match=kind):
            check_branches([collective], of_devices)


def test_skips_change_nothing_but_the_program():
    """Results are equal, and each platform has its own way."""
    assert [skips_on(p).most_conditionals for p in ("tpu", "gpu", "cpu")] == [0, 1, np.inf]
    for skips in (Skips(0), CONDITIONALS):
        run = jax.jit(partial(skips.run_if, function=lambda x: x + 1, num_pieces=3))
        assert [int(run(c, carry=jnp.int32(4))) for c in (True, False)] == [5, 4]
        text = str(jax.make_jaxpr(partial(skips.run_if, function=lambda x: x + 1))(True, carry=4))
        assert ("cond[" in text) == (skips is CONDITIONALS)
