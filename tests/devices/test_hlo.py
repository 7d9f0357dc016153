"""What is read from the text of compiled programs, made here and elsewhere."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax import Array, lax

from tpipe_jax.devices.hlo import Operation, array_bytes, read

# As XLA writes it for a TPU: layouts have parentheses, and results of several kinds.
TPU = """HloModule jit_f

%body.1 (p: f32[]) -> f32[] {
  %start.1 = (u32[4]{0:T(128)S(1)}, u32[4]{0:T(128)}, u32[]{:S(2)}) copy-start(%c.1), channel_id=1
  ROOT %copy.2 = bf16[2,16]{1,0:T(8,128)(2,1)S(1)} copy(%start.1), metadata={op_name="f/while/x"}
}

ENTRY %main (p: f32[2]) -> (f32[2], s32[]) {
  %p = f32[2]{0} parameter(0)
  %n = s32[] constant(3)
  ROOT %while.1 = (f32[2]{0}, /*index=1*/s32[]) while(%p, %n), condition=%cond.1, body=%body.1, \
metadata={op_name="f/while"}, backend_config={"known_trip_count":{"n":"7"}}
}
""".replace("\\\n", "")


def compiled(function: Callable[..., Array], *args: Array) -> list[Operation]:
    return list(read(jax.jit(function).lower(*args).compile().as_text()).operations())


def test_operations_with_all_kinds_of_layouts():
    program = read(TPU)
    assert program.entry == "main"
    assert list(program.computations) == ["body.1", "main"]
    start, copy = program.computations["body.1"]
    assert (start.opcode, start.operands) == ("copy-start", ("c.1",))
    assert array_bytes(start.shape) == [16, 16, 4]
    assert (copy.opcode, copy.operands, copy.num_bytes) == ("copy", ("start.1",), 64)
    assert (copy.source, start.source) == ("f/while/x", "")
    loop = program.computations["main"][-1]
    assert (loop.opcode, loop.operands) == ("while", ("p", "n"))
    assert (loop.num_turns, loop.body, loop.parts) == (7, "body.1", ["body.1"])
    assert loop.called == ["cond.1", "body.1"]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[]", [4]),
        ("bf16[3,5]{1,0}", [30]),
        ("pred[8]", [8]),
        ("s4[8]", [4]),
        ("f8e4m3fn[10]", [10]),
        ("c64[2]", [16]),
        ("f32[0]", [0]),
        ("(f32[2], u8[3])", [8, 3]),
        ("token[]", [0]),
    ],
)
def test_bytes_of_shapes(shape: str, expected: list[int]):
    assert array_bytes(shape) == expected


def test_loops_and_their_turns():
    def known(x: Array) -> Array:
        return lax.fori_loop(0, 5, lambda _, x: jnp.sin(x) @ x, x)

    def unknown(x: Array, n: Array) -> Array:
        return lax.fori_loop(0, n, lambda _, x: jnp.sin(x) @ x, x)

    x = jnp.ones((4, 4))
    [loop] = [o for o in compiled(known, x) if o.opcode == "while"]
    assert loop.num_turns == 5
    [loop] = [o for o in compiled(unknown, x, jnp.int32(3)) if o.opcode == "while"]
    assert loop.num_turns is None


def test_branches():
    def either(condition: Array, x: Array) -> Array:
        return lax.cond(condition, lambda x: jnp.sin(x) @ x, lambda x: x, x)

    def one_of(index: Array, x: Array) -> Array:
        return lax.switch(index, [lambda x: x @ x, lambda x: x, lambda x: jnp.sin(x) @ x], x)

    x = jnp.ones((4, 4))
    for function, number in ((either, 2), (one_of, 3)):
        index = jnp.bool(True) if number == 2 else jnp.int32(1)
        [conditional] = [o for o in compiled(function, index, x) if o.opcode == "conditional"]
        assert len(conditional.branches) == len(conditional.parts) == number


def test_other_text_is_refused():
    with pytest.raises(AssertionError, match="not the text of a compiled program"):
        read("module @jit_f {}")
