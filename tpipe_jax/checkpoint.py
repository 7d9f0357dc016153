"""Checkpoints of a run: saved in the background, in the model's own layout, and checked when read.

Arrays are written and read by TensorStore, as Zarr. `model_layout` says what of the model lies
where on a mesh, `checkpoint_files` what makes a folder a checkpoint (docs/checkpoints.md).
"""

import json
import os
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from tpipe_jax import checkpoint_files as files
from tpipe_jax.checkpoint_files import DamagedError
from tpipe_jax.config import CheckpointConfig, ModelConfig, UserError
from tpipe_jax.model_layout import Index, Piece, Shape, pieces, restored
from tpipe_jax.processes import from_all, from_first, meet

PyTree = Any

NUM_READERS = 8  # arrays that are read at the same time


class Checkpoints:
    """The newest `config.keep` checkpoints of a run, each in a folder named by its step.

    Every process of a run constructs and calls this alike. Warnings go to `say`. Raises `UserError`
    if `folder` is unwritable.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        model: ModelConfig,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._config, self._model, self._say = folder, config, model, say
        self._identity = {"model": asdict(model)}
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None
        self._last_step: int | None = None  # that has been read or saved
        self._num_saves = 0
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError("permission denied")
            if jax.process_index() == 0:
                files.clean(folder)

    def newest_step(self) -> int | None:
        """The step of the newest sound checkpoint, or None. Newer ones, which are damaged, are put
        aside.

        Raises `UserError` if it is one of another model, or if all are damaged; nothing is changed
        then.
        """
        self.wait()
        steps = files.list_steps(self._folder)
        expected = json.loads(from_first(json.dumps(steps)))
        if steps != expected:
            raise UserError(
                f"{self._folder} has checkpoints of steps {expected} for process 0 and {steps} for "
                f"process {jax.process_index()}: give --workdir a folder that all hosts share."
            )
        damaged: dict[int, str] = {}
        for step in steps:
            if damage := self._damage(step):
                damaged[step] = damage
                continue
            self._check_identity(step)
            for other, damage in damaged.items():
                self._put_aside(other, damage)
            self._last_step = step
            return step
        if damaged:
            newest, damage = next(iter(damaged.items()))
            raise UserError(
                f"no checkpoint in {self._folder} is sound ({newest}: {damage}): restore one from "
                "a copy, or start another run with --workdir."
            )
        return None

    def save(self, step: int, state: PyTree) -> float:
        """Saves arrays, in the background unless `config.async_` says otherwise; does nothing if
        `step` was the last. Returns the seconds that this has taken from training.

        The caller may donate `state` as soon as this returns: its arrays have been copied to the
        host by then. On a CPU the copy is a view, and XLA does not reuse memory that has a view on
        it.

        Raises `UserError` if this save cannot start, or if the one before it has failed.
        """
        start = time.monotonic()
        self.wait()
        if step != self._last_step:
            self._last_step = step
            self._num_saves += 1
            saving = self._folder / f"{step}{files.SAVING}"
            with self._writing():
                saving.mkdir(exist_ok=True)
            parts = list(pieces(self._model, state))
            self._saving = self._thread.submit(self._save, saving, step, parts, self._num_saves)
            if not self._config.async_:
                self.wait()
        return time.monotonic() - start

    def restore(self, step: int, like: PyTree) -> PyTree:
        """The state as saved, bitwise, in the shardings of `like`.

        Raises `UserError` if something of it is missing.
        """
        folder = self._folder / str(step)
        open_array = cache(lambda name: _open(folder / name))

        def read(name: str, shape: Shape, index: Index) -> np.ndarray:
            array = open_array(name)
            if array.shape != shape:
                raise ValueError(f"{name} has shape {array.shape} instead of {shape}")
            return array[index].read().result()

        leaves, structure = jax.tree.flatten_with_path(like)
        paths, likes = zip(*leaves, strict=True)
        try:
            with ThreadPoolExecutor(NUM_READERS) as pool:
                arrays = pool.map(
                    lambda path, a: restored(self._model, path, a, read), paths, likes
                )
                return jax.tree.unflatten(structure, list(arrays))
        except (ValueError, OSError) as error:  # TensorStore's for all that goes wrong
            raise UserError(
                f"the checkpoint in {folder} cannot be read ({_brief(error)}): move that folder "
                "away to continue from an older one, or start another run with --workdir."
            ) from error

    def raise_failure(self) -> None:
        """Raises `UserError` if a save has failed meanwhile."""
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Returns when no save is under way. Raises `UserError` if the last one has failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with self._writing(ValueError):  # TensorStore's for a full disk
                saving.result()

    def close(self) -> None:
        """Waits as `wait` does, and ends the background thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _damage(self, step: int) -> str:
        """What is wrong with a checkpoint, of which each process reads a part; empty if nothing."""
        own = ""
        try:
            part = jax.process_index(), jax.process_count()
            files.check(self._folder / str(step), *part)
        except (DamagedError, OSError) as error:
            own = _brief(error)
        return next(filter(None, from_all(own)), "")

    def _put_aside(self, step: int, damage: str) -> None:
        """So that it is not in the way when the run comes to this step again."""
        if jax.process_index() == 0:
            with self._writing():
                aside = files.put_aside(self._folder / str(step))
            self._say(f"the checkpoint of step {step} is damaged ({damage}): it is now {aside}")

    def _check_identity(self, step: int) -> None:
        saved = dict(_settings(files.read_manifest(self._folder / str(step)).identity))
        ours = dict(_settings(self._identity))
        differences = [
            f"{name}={saved.get(name)}, but this run has {ours.get(name)}"
            for name in {**ours, **saved}
            if saved.get(name) != ours.get(name)
        ]
        if differences:
            raise UserError(
                f"the checkpoint in {self._folder} was written with {'; with '.join(differences)}: "
                "use the same settings, or start another run with --workdir."
            )

    def _save(self, saving: Path, step: int, parts: Sequence[Piece], number: int) -> None:
        """Writes what this process has; process 0 finishes when all have."""
        own, index = saving / f"digests.{jax.process_index()}", jax.process_index()
        written = _write(saving, parts)
        own.write_text(json.dumps(files.digests(saving, written)))
        meet(f"checkpoint {number}: written")
        if index == 0:
            known: files.Digests = {}
            for path in sorted(saving.glob("digests.*")):
                known |= json.loads(path.read_text())
                path.unlink()
            files.write_manifest(saving, step, self._identity, known)
            files.finish(saving, step)
            for old in files.list_steps(self._folder)[self._config.keep :]:
                files.remove(self._folder / str(old))
        meet(f"checkpoint {number}: finished")

    @contextmanager
    def _writing(self, *errors: type[Exception]) -> Iterator[None]:
        try:
            yield
        except (OSError, *errors) as error:
            raise UserError(
                f"cannot write checkpoints to {self._folder} ({_brief(error)}): make it writable "
                "and see that the disk has space, or choose another folder with --workdir."
            ) from error


def _write(folder: Path, parts: Sequence[Piece]) -> list[str]:
    """Writes parts of arrays; returns the names of the files that have them."""
    names, commits = [], []
    arrays = [(_create(folder / part.name, part), part) for part in parts]
    for opened, part in arrays:
        target = opened.result()[part.index]
        # Not copied, since nobody changes it: arrays of jax are immutable.
        future = target.write(part.data, can_reference_source_data_indefinitely=True)
        commits.append(future.commit)
        grid = [i.start // n for i, n in zip(part.index, part.chunk, strict=True)]
        names.append(f"{part.name}/{'.'.join(map(str, grid)) or '0'}")
    for commit in commits:
        commit.result()
    return names


def _create(path: Path, part: Piece) -> Any:
    """Opens an array that several processes may create."""
    metadata = {"shape": part.shape, "chunks": part.chunk, "compressor": None}
    spec = {
        **_spec(path),
        "metadata": metadata,
        "dtype": part.data.dtype.name,
        "store_data_equal_to_fill_value": True,  # else zeros have no file
    }
    return ts.open(spec, create=True, open=True)


def _open(path: Path) -> Any:
    return ts.open(_spec(path), read=True).result()


def _spec(path: Path) -> dict[str, Any]:
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path.absolute()}/"}}


def _settings(identity: dict[str, Any], prefix: str = "config") -> Iterator[tuple[str, Any]]:
    for name, value in identity.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value


def _brief(error: Exception) -> str:
    return textwrap.shorten(str(error), 160, placeholder=" ...")
