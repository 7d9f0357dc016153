"""Folders of checkpoints, and what tests ask of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from support.numbered_states import MODEL, abstract
from tpipe_jax.checkpoint.checkpoints import Checkpoints
from tpipe_jax.config.settings import CheckpointConfig, MeshConfig, ModelConfig
from tpipe_jax.training.state import TrainState

ONE, FOUR = MeshConfig(), MeshConfig(1, 2, 2)
PIECES = ["--config.mesh.data=2", "--config.mesh.pipe=1", "--config.mesh.model=2"]


@contextmanager
def open_folder(
    folder: Path,
    keep: int = 2,
    model: ModelConfig = MODEL,
    said: list[str] | None = None,
    **more: Any,
) -> Iterator[Checkpoints]:
    config = CheckpointConfig(keep=keep, **more)
    say = (said if said is not None else []).append
    with Checkpoints(folder, config, model, say) as checkpoints:
        yield checkpoints


def like(config: MeshConfig = ONE) -> TrainState:
    return abstract(config)[1]


def assert_same(got: TrainState, want: TrainState) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
