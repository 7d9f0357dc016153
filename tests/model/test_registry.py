"""Blocks of one's own that the pipeline cannot run, each answered with what to mend."""

import re
from pathlib import Path

import pytest

from support.own_blocks import LLAMA, make_config
from tpipe_jax.config.settings import MeshConfig, ModelConfig
from tpipe_jax.errors import UserError
from tpipe_jax.model.sharding import check_model

BROKEN_BLOCKS = """
import jax.numpy as jnp
from flax import nnx
from tpipe_jax import Block
class Other: pass
class Empty(Block): pass
class Good(Block):
    def __init__(self, config, dtype, rngs): pass
    def qkv(self, x, positions, tape): return (x.reshape(2, 3, 4, 4),) * 3
    def finish(self, x, attn, tape): return x
class Wide(Good):
    def finish(self, x, attn, tape): return x[..., :8]
class Heads(Good):
    def qkv(self, x, positions, tape):
        q, k, v = super().qkv(x, positions, tape)
        return q, k[:, :, :3], v[:, :, :3]
class HeadsFirst(Good):
    def qkv(self, x, positions, tape): return (x.reshape(2, 3, 4, 4).swapaxes(1, 2),) * 3
class Twice(Good):
    def finish(self, x, attn, tape): return tape("hidden", tape("hidden", x))
class Taken(Good):
    def finish(self, x, attn, tape): return tape("q", x)
class Flat(Good):
    def finish(self, x, attn, tape): return x + tape("hidden", x[..., 0])[..., None]
class Float(Good):
    def finish(self, x, attn, tape): return x.astype(jnp.float32)
class NoLinear(Good):
    linears = {"norm": ("hidden", "out")}
class NoValue(Good):
    linears = {"linear": ("hidden", "out")}
    specs = {}
    def __init__(self, config, dtype, rngs):
        self.linear = nnx.Linear(16, 16, dtype=dtype, rngs=rngs)
class OtherValue(NoValue):
    def finish(self, x, attn, tape): return tape("out", x) + tape("hidden", x[..., :8]).sum()
class Specs(NoValue):
    def finish(self, x, attn, tape): return tape("out", self.linear(tape("hidden", x)))
class NoNorm(Specs):
    specs = None
    norms = {"linear": "linear"}
class NoLayer(NoNorm):
    norms = {"norm": "norm"}
    def __init__(self, config, dtype, rngs):
        super().__init__(config, dtype, rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
class NoBias(NoLayer):
    norms = {"norm": "linear"}
    def __init__(self, config, dtype, rngs):
        super().__init__(config, dtype, rngs)
        self.linear = nnx.Linear(16, 16, use_bias=False, dtype=dtype, rngs=rngs)
class NarrowNorm(NoLayer):
    norms = {"norm": "linear"}
    def __init__(self, config, dtype, rngs):
        super().__init__(config, dtype, rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)
"""
BROKEN = {
    "none": ("", "names no Python file"),
    "no class": ("x.py:Missing", "is no class derived from tpipe_jax.Block"),
    "other class": ("x.py:Other", "is no class derived from tpipe_jax.Block"),
    "not finished": ("x.py:Empty", r"cannot be run \(NotImplementedError"),
    "other output": ("x.py:Wide", r"makes \(2, 3, 8\) of \(2, 3, 16\)"),
    "same name twice": ("x.py:Twice", "the name hidden is taken"),
    "name of the stage": ("x.py:Taken", "the name q is taken"),
    "no width": ("x.py:Flat", r"hidden is \(2, 3\), and not"),
    "other format": ("x.py:Float", "its output is float32 where bfloat16 is computed in"),
    "no linear": ("x.py:NoLinear", "linears has norm, which is no layer of a kernel"),
    "no value": ("x.py:NoValue", "linears has hidden and out, which the tape must have both"),
    "other value": ("x.py:OtherValue", "linear is not a product from hidden to out"),
    "other specs": ("x.py:Specs", "specs is not a tree like"),
    "no norm": ("x.py:NoNorm", "norms has linear, which is no norm of a scale"),
    "no layer": ("x.py:NoLayer", "norms has norm, which is no layer that norm can be part of"),
    "no bias": ("x.py:NoBias", "norms has linear, which is no layer that norm can be part of"),
    "narrow norm": ("x.py:NarrowNorm", "norm is not as wide as the input of linear"),
    "other heads": ("x.py:Heads", "make them .B, L, G H, K. and twice"),
    "heads first": ("x.py:HeadsFirst", "make them .B, L, G H, K. and twice"),
    "does not load": ("y.py:Block", r"cannot be used \(ZeroDivisionError"),
}


@pytest.mark.parametrize(("name", "sentence"), BROKEN.values(), ids=BROKEN)
def test_mistakes_are_answered(tmp_path: Path, name: str, sentence: str):
    (tmp_path / "y.py").write_text("1 / 0\n")
    (tmp_path / "x.py").write_text(BROKEN_BLOCKS)
    setting = f"{tmp_path}/{name}" if name else "gpt3"
    config = make_config(setting, MeshConfig()).model
    with pytest.raises(UserError, match=rf"config\.model\.block={re.escape(setting)} .*{sentence}"):
        check_model(config, MeshConfig())


def test_heads_that_model_does_not_divide():
    """More devices than heads of keys are right: each has a copy."""
    config = make_config(LLAMA, MeshConfig()).model
    check_model(config, MeshConfig(model=4))
    with pytest.raises(UserError, match=r"mesh\.model=8 does not divide the heads of .* 4:"):
        check_model(config, MeshConfig(model=8))
    config = ModelConfig(num_heads=6, num_kv_heads=3, d_model=24, d_ff=64, family="llama")
    with pytest.raises(UserError, match=r"mesh\.model=2 neither divides the 3 heads of keys nor"):
        check_model(config, MeshConfig(model=2))
