"""What a checkpoint keeps training waiting for, and how long it takes in all, beside Orbax.

    python bench/checkpoint.py
    python bench/checkpoint.py --folder=/mnt/disk --d-model=1024 --rounds=9

Saves and restores the state of a GPT on two CPU devices. `stall` is the time until the call
returns, and `step` how much longer than usual a step then takes that changes the state in place: a
state that is still being read cannot be. `save` is the time until all of it is on the disk,
`restore` until a state is back.
Ours writes digests, and compares them before it restores; Orbax has none. The two take turns;
figures are medians over the rounds. Orbax is left out where it is not installed
(pip install orbax-checkpoint).
"""

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from tpipe_jax.checkpoint.checkpoints import Checkpoints
from tpipe_jax.config.settings import Config, MeshConfig, ModelConfig
from tpipe_jax.devices.mesh import make_mesh
from tpipe_jax.pipeline.spec import make_spec
from tpipe_jax.training.optimizer import make_optimizer
from tpipe_jax.training.state import abstract_state, init_state

Times = tuple[float, float, float, float]


def main() -> None:
    args = parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    model = ModelConfig(num_layers=args.num_layers, d_model=args.d_model, num_heads=4)
    config = Config(model=model, mesh=MeshConfig(pipe=2))
    spec = make_spec(config, make_mesh(config.mesh, jax.devices()))
    optimizer = make_optimizer(config)
    state, like = init_state(spec, optimizer), abstract_state(spec, optimizer)
    num_bytes = sum(a.nbytes for a in jax.tree.leaves(state))
    print(f"{num_bytes / 1e6:.0f} MB, jax {jax.__version__}, medians of {args.rounds} rounds")
    in_place = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)

    def step() -> float:
        """Changes the state in place, as a training step does. Returns the seconds."""
        nonlocal state
        start = time.perf_counter()
        state = jax.block_until_ready(in_place(state))
        return time.perf_counter() - start

    usual = statistics.median([step() for _ in range(10)][1:])

    def ours(folder: Path) -> Times:
        with Checkpoints(folder, config.checkpoint, model, print) as checkpoints:
            start = time.perf_counter()
            stall = checkpoints.save(1, state)
            longer = step() - usual
            checkpoints.wait()
            saved = time.perf_counter()
            assert checkpoints.newest_step() == 1
            jax.block_until_ready(checkpoints.restore(1, like))
            return stall, longer, saved - start, time.perf_counter() - saved

    ways: dict[str, Callable[[Path], Times]] = {"tpipe_jax": ours}
    try:
        import orbax.checkpoint as ocp  # pyrefly: ignore[missing-import]
    except ImportError:
        print("without Orbax, which is not installed")
    else:

        def orbax(folder: Path) -> Times:
            checkpointer = ocp.StandardCheckpointer()
            start = time.perf_counter()
            checkpointer.save(folder / "1", state)
            stall = time.perf_counter() - start
            longer = step() - usual
            checkpointer.wait_until_finished()
            saved = time.perf_counter()
            jax.block_until_ready(checkpointer.restore(folder / "1", like))
            times: Any = stall, longer, saved - start, time.perf_counter() - saved
            checkpointer.close()
            return times

        ways["orbax"] = orbax

    times: dict[str, list[Times]] = {name: [] for name in ways}
    for _ in range(1 + args.rounds):  # the first warms up
        for name, way in ways.items():
            folder = Path(tempfile.mkdtemp(dir=args.folder))
            times[name].append(way(folder))
            shutil.rmtree(folder)
    names = f"{'stall, s':>9} {'step, s':>9} {'save, s':>9} {'restore, s':>11} {'save, MB/s':>11}"
    print(f"{'':10} {names}")
    for name, rounds in times.items():
        stall, longer, save, restore = map(statistics.median, zip(*rounds[1:], strict=True))
        figures = f"{stall:9.3f} {longer:9.3f} {save:9.2f} {restore:11.2f}"
        print(f"{name:10} {figures} {num_bytes / save / 1e6:11.0f}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="on the disk that is measured")
    parser.add_argument("--num-layers", type=int, default=12)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
