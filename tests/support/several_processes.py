"""Programs of several processes for tests: what they run, and how they are started."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from support.fake_profiler import FakeProfiler
from tpipe_jax.checkpoint import checkpoints as saving
from tpipe_jax.checkpoint.checkpoints import Checkpoints
from tpipe_jax.commands.launch import launch
from tpipe_jax.commands.train import train
from tpipe_jax.config.command_line import parse
from tpipe_jax.config.settings import Config, resolved
from tpipe_jax.devices.mesh import make_mesh, put_read_rows, put_rows
from tpipe_jax.errors import UserError
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.profiling import measured_plan
from tpipe_jax.reporting.console import Console
from tpipe_jax.runtime import failures, processes
from tpipe_jax.runtime.exits import exit_status
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import abstract_state, init_state

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*args: str, program: str = __file__, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Starts a program, by default this file, whose first argument says what it does."""
    return subprocess.Popen(
        [*prefix, sys.executable, program, *args],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_all(num: int, *args: str, each: Sequence[Sequence[str]] = ()) -> list[subprocess.Popen]:
    """Starts this file `num` times by hand; `each` has further arguments of single processes."""
    where = f"--coordinator=127.0.0.1:{free_port()}"
    return [
        start(*args, where, f"--num-processes={num}", f"--process-id={i}", *(each or [[]] * num)[i])
        for i in range(num)
    ]


def results(children: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each, once all have ended."""
    try:
        texts = [child.communicate(timeout=400) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, *text) for child, text in zip(children, texts, strict=True)]


def exchange(mesh: jax.sharding.Mesh) -> None:
    """Prints what this process has seen of the others, as JSON."""
    index = jax.process_index()
    tokens = np.arange(12, dtype=np.int32).reshape(4, 3)
    asked: list[list[int]] = []

    def read(rows: slice) -> np.ndarray:
        asked.append(list(range(rows.start, rows.stop)))
        return tokens[rows]

    placed = put_read_rows(mesh, read, tokens.shape, tokens.dtype)
    total = jax.jit(lambda a, b: (a * (1 + b)).sum())(placed, put_rows(mesh, tokens))
    print(
        json.dumps(
            {
                "text": processes.from_first(f"von {index}: äöü" * (1 + index)),
                "nothing": processes.from_first("" if index == 0 else "something"),
                "all": processes.from_all(f"{index}ü" * index),
                "hosts": processes.host_names(),
                "asked": asked,
                "total": int(total),
            }
        ),
        flush=True,
    )


def save(what: str, mesh: jax.sharding.Mesh, config: Config, workdir: Path) -> None:
    """Saves and restores a state; with `what`, in a way that must fail."""
    index = jax.process_index()
    if what == "save apart":  # as if the hosts had folders of their own
        workdir = workdir / str(index)
    if what == "save where one fails" and index == jax.process_count() - 1:

        def fail(*_: Any) -> Any:
            raise OSError("no space in the last process")

        saving.write_arrays = fail
    optimizer = make_optimizer(config)
    state = init_state(make_spec(config, mesh), optimizer)
    with Checkpoints(workdir, config.checkpoint, config.model, print) as checkpoints:
        assert checkpoints.newest_step() is None
        checkpoints.save(1, state)
        checkpoints.wait()
        assert checkpoints.newest_step() == 1
        restored = checkpoints.restore(1, abstract_state(make_spec(config, mesh), optimizer))
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True)
    for a, b in pairs:
        shards = zip(a.addressable_shards, b.addressable_shards, strict=True)
        assert all(np.array_equal(x.data, y.data) for x, y in shards)
    print("restored", flush=True)


def choose(config: Config, workdir: Path, devices: Sequence[jax.Device]) -> None:
    """Trains on the mesh that takes least by the clock of `FakeProfiler`, and prints that."""
    measured_plan.Profiler = FakeProfiler  # pyrefly: ignore
    train(config, workdir, devices, Console(is_quiet=True))
    described = json.loads((workdir / "config.json").read_text())
    print(json.dumps([described["mesh"][axis] for axis in ("data", "pipe", "model")]), flush=True)


def work(what: str, config: Config, workdir: Path, devices: Sequence[jax.Device]) -> None:
    if what == "auto":
        choose(config, workdir, devices)
        return
    index, last = jax.process_index(), jax.process_count() - 1
    mesh = make_mesh(config.mesh, devices)
    if what == "exchange":
        exchange(mesh)
    if what.startswith("save"):
        save(what, mesh, resolved(config), workdir)
    if what == f"kill {index}":
        os.kill(os.getpid(), signal.SIGKILL)
    if index == last:
        if what == "raise":
            raise ZeroDivisionError("in the last process")
        if what == "user error":
            raise UserError("this cannot be mended.")
    if what == "raise in the first" and index == 0:
        raise ZeroDivisionError("in the first process")
    if what == "hang":  # the last one comes to its end first, since the other has just begun
        with failures.watched() as expect:
            expect("error: step 3 has taken too long", 2 if index == last else 100)
            if index == last:
                time.sleep(100)
            multihost_utils.sync_global_devices("the others wait here")
    if what == "late":  # after the others have nothing more to do
        time.sleep(2 * failures.POLL_SECONDS if index == last else 0)
        if index == last:
            raise ZeroDivisionError("in the last process")
        return
    multihost_utils.sync_global_devices("the others wait here")


def watched(seconds: float) -> None:
    with failures.watched() as expect:
        expect("sleeping", seconds)
        print("ready", flush=True)
        time.sleep(1.5)
    print("done", flush=True)


def main() -> int:
    what, *args = sys.argv[1:]
    if what.startswith("watched"):
        watched(float(what.split()[1]))
        return 0
    flags = parse(args, program="several.py")
    return launch(flags, lambda config, dir_, devices, _: work(what, config, dir_, devices))


if __name__ == "__main__":
    sys.exit(exit_status(main))
