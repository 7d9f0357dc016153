"""Options of jax that a user has set for other programs."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tpipe_jax
from support import runs
from tpipe_jax.cli.main import run
from tpipe_jax.profiling.clock import prepared
from tpipe_jax.runtime.jax_options import NEEDED, OF_PROGRAMS, needed

OTHERS = {
    "jax_enable_x64": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
    "jax_disable_jit": True,
    "jax_debug_key_reuse": True,
}


@pytest.fixture
def others() -> Iterator[None]:
    """A process in which the options are set otherwise, in all threads."""
    before = {name: getattr(jax.config, name) for name in OTHERS}
    try:
        for name, value in OTHERS.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_a_program_has_the_options_that_it_needs_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in OF_PROGRAMS:
        monkeypatch.delenv(name.upper(), raising=False)
    assert run("checkpoints", ["nowhere"]) == 2
    assert capsys.readouterr().err.startswith("error: nowhere has no folder")
    assert not [name for name in OF_PROGRAMS if name.upper() in os.environ]

    monkeypatch.setenv("JAX_ENABLE_X64", "True")
    monkeypatch.setenv("JAX_DISABLE_JIT", "off")  # as it should be
    monkeypatch.setenv("JAX_NUMPY_DTYPE_PROMOTION", "standard")
    monkeypatch.setenv("JAX_NUMPY_RANK_PROMOTION", "raise")
    assert run("checkpoints", ["nowhere"]) == 2
    note, *_ = capsys.readouterr().err.splitlines()
    assert note.startswith("note: JAX_ENABLE_X64=True JAX_NUMPY_RANK_PROMOTION=raise would change")
    assert os.environ["JAX_ENABLE_X64"] == "0"
    assert os.environ["JAX_NUMPY_RANK_PROMOTION"] == "allow"


def test_jax_understands_the_variables():
    program = (
        "from tpipe_jax.runtime.jax_options import OF_PROGRAMS, set_needed\n"
        "import sys\n"
        "assert 'jax' not in sys.modules\n"
        "set_needed()\n"
        "import jax\n"
        "print(*(getattr(jax.config, name) for name in OF_PROGRAMS))\n"
    )
    environment = os.environ | {name.upper(): str(value) for name, value in OTHERS.items()}
    environment["JAX_TRANSFER_GUARD"] = "disallow"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False standard allow False False allow\n"
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("others")
def test_the_options_are_set_inside_and_in_threads_that_compile():
    assert OTHERS.keys() == NEEDED.keys()
    values = {name: getattr(jax.config, name) for name in OTHERS}
    with needed():
        assert jnp.zeros(2).dtype == jnp.float32
        jobs = [lambda: (jnp.zeros((3, 2), jnp.bfloat16) + jnp.ones(2)).dtype] * 2
        assert prepared({"a": jobs}, lambda _: None) == {"a": [jnp.float32] * 2}
    assert {name: getattr(jax.config, name) for name in OTHERS} == values


def one_step(folder: Path) -> tuple[float, dict[str, np.dtype]]:
    """The loss of a step, and the types of its state."""
    config = runs.small_config(folder)
    step = tpipe_jax.make_train_step(config)
    rows = np.arange(4 * 17, dtype=np.int32).reshape(4, 17) % 7
    state, metrics = step(step.init(), rows)
    types = {jax.tree_util.keystr(path): x.dtype for path, x in jax.tree.leaves_with_path(state)}
    return float(metrics["loss"]), types


@pytest.mark.slow
def test_the_library_computes_the_same_whatever_the_options(
    tmp_path: Path, request: pytest.FixtureRequest
):
    expected = one_step(tmp_path)
    request.getfixturevalue("others")
    assert one_step(tmp_path) == expected
    assert jax.config.jax_enable_x64  # pyrefly: ignore


@pytest.mark.slow
def test_a_run_trains_whatever_the_options(tmp_path: Path):
    settings = ["num-layers=2", "d-model=32", "num-heads=2", "seq-len=64"]
    args = [f"--config.model.{setting}" for setting in settings]
    args += ["--config.train.num-steps=2", "--config.train.batch-size=2"]
    args += ["--config.plan.token-slices=uniform:2", "--config.plan.batch-slices=uniform:2"]
    last = []
    for n, variables in enumerate(({}, {k.upper(): str(v) for k, v in OTHERS.items()})):
        workdir = tmp_path / str(n)
        child = runs.launch(*args, f"--workdir={workdir}", env=os.environ | variables)
        _, err = child.communicate(timeout=400)
        assert (child.returncode, err.count("\n")) == (0, n), err
        last.append(runs.metrics(workdir)[-1]["loss"])
    assert last[0] == last[1]
