"""Checkpoints of a run: saved in the background, in the model's own layout, and checked when read.

Arrays are stored as Zarr, which TensorStore reads. `layout` says which part of the model lies where
on a mesh. `manifest` says what makes a folder a checkpoint (docs/checkpoints.md).
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import jax

from tpipe_jax.checkpoint import manifest
from tpipe_jax.checkpoint.arrays import PyTree, restore, write_arrays
from tpipe_jax.checkpoint.described import model_of
from tpipe_jax.checkpoint.layout import Fragment, fragments
from tpipe_jax.checkpoint.manifest import DamagedError
from tpipe_jax.config.own_runs import CHECKPOINTS, check_links
from tpipe_jax.config.settings import (
    CheckpointConfig,
    ModelConfig,
    differences,
    resolved_model,
)
from tpipe_jax.config.user_code import block_digest
from tpipe_jax.errors import UserError, brief, shown
from tpipe_jax.files import as_user_error
from tpipe_jax.runtime.processes import from_all, from_first, gathered

# Settings of the model that no parameter of Llama's family depends on.
FREE = tuple(
    f"config.model.{name}" for name in ("seq_len", "rope_theta", "rope_scaling", "sliding_window")
)


class Checkpoints:
    """The newest `config.keep` checkpoints of a run, each in a folder named by its step.

    Every process of a run constructs this and makes the same calls, `newest_step` first. Warnings
    go to `say`. Raises `UserError` if `folder` is unwritable.
    """

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        model: ModelConfig,
        say: Callable[[str], None],
    ) -> None:
        self._folder, self._config, self._model, self._say = folder, config, model, say
        self.num_chunks = 1  # chunks of each stage, in the states that are saved and restored
        self.data_at: Callable[[int], dict[str, int]] | None = None
        """What has been read of the data up to a step, which is saved with it (`Manifest.data`)."""
        self._identity, self._block = identity_of(model), _digest_or_none(model)
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: tuple[int, Future[None]] | None = None
        self._last_step: int | None = None  # the last that was found or saved
        self._num_saves, self._started = 0, 0.0
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError("permission denied")

    def newest_step(self) -> int | None:
        """Returns the step of the newest sound checkpoint, or None. Newer checkpoints, which are
        damaged, are put aside.

        Raises `UserError` if the newest sound checkpoint is of another model, or if all are
        damaged. Then no checkpoint is put aside.
        """
        self.wait()
        with self._writing():
            if jax.process_index() == 0:  # the others wait for it in `from_first`
                manifest.clean(self._folder)
            steps = manifest.list_steps(self._folder)
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
        """Saves a state: in the background, or before it returns if `config.async_` is off. Does
        nothing if `step` was the last that was found or saved. Returns the seconds that this has
        taken from training.

        The caller may donate `state` as soon as this returns: its arrays have been copied to the
        host by then.

        Raises `UserError` if this save cannot start, or if the one before it has failed.
        """
        start = time.monotonic()
        self.wait()
        if step != self._last_step:
            self._num_saves += 1
            parts = list(fragments(self._model, state, self.num_chunks))
            self._started = time.monotonic()
            save = self._thread.submit(self._save, step, parts, self._num_saves)
            self._saving = step, save
            if not self._config.async_:
                self.wait()
        return time.monotonic() - start

    def restore(self, step: int, like: PyTree) -> PyTree:
        """Returns the state as saved, bitwise, in the shardings of `like`.

        Raises `UserError` if an array of it is missing or cannot be read.
        """
        return restore(self._folder / str(step), self._model, like, self.num_chunks)

    def data(self, step: int) -> dict[str, int] | None:
        """Returns what was saved with a step on the data up to it; None if nothing was."""
        return manifest.read_manifest(self._folder / str(step)).data

    def seq_len(self, step: int) -> int:
        """Returns the tokens of the sequences that the run of a checkpoint has read."""
        return manifest.read_manifest(self._folder / str(step)).identity["model"]["seq_len"]

    def raise_failure(self, timeout_seconds: float = math.inf) -> None:
        """Raises `UserError` if a save has failed in the background. Waits for a save that has been
        under way for more than `timeout_seconds`; it may never end.
        """
        is_late = time.monotonic() - self._started > timeout_seconds
        if self._saving is not None and (self._saving[1].done() or is_late):
            self.wait()

    def wait(self) -> None:
        """Waits until no save is under way. Raises `UserError` if the last one has failed."""
        if self._saving is not None:
            (step, save), self._saving = self._saving, None
            with self._writing():
                save.result()
            self._last_step = step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Waits for a save under way, except after Ctrl-C, and ends the background thread."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._thread.shutdown(wait=False, cancel_futures=True)
            return
        try:
            self.wait()
        except UserError:
            if kind is None:  # else the error that came first is raised
                raise
        finally:
            self._thread.shutdown()

    def _damage(self, step: int) -> str:
        """Returns what is wrong with a checkpoint; empty if nothing is. Each process reads a part
        of it.

        Raises `UserError` if a process cannot read its part, which need not be damage.
        """
        damage = failure = ""
        try:
            part = jax.process_index(), jax.process_count()
            manifest.check(self._folder / str(step), *part)
        except DamagedError as error:
            damage = brief(error)
        except OSError as error:
            failure = brief(error)
        if found := next(filter(None, from_all(failure)), ""):
            raise UserError(
                f"the checkpoint in {self._folder / str(step)} cannot be read ({found}): see that "
                "all hosts can, or move it away to continue from an older one."
            )
        return next(filter(None, from_all(damage)), "")

    def _put_aside(self, step: int, damage: str) -> None:
        """Renames a damaged checkpoint, so that its name is free when the run comes to this step
        again.
        """
        if jax.process_index() == 0:
            with self._writing():
                aside = manifest.put_aside(self._folder / str(step))
            self._say(f"the checkpoint of step {step} is damaged ({damage}): it is now {aside}")

    def _check_identity(self, step: int) -> None:
        """Raises `UserError` if a checkpoint is of another model. Says so if it was written with
        another file of the user's own block, or with other settings of what is no parameter.
        """
        about = manifest.read_manifest(self._folder / str(step))
        saved = _completed(about.identity)
        if about.block is not None and self._model.has_own_block:
            if isinstance(saved.get("model"), dict):  # the file may have moved
                saved["model"]["block"] = self._model.block
            if line := block_change(self._model.block, self._block, about.block):
                self._say(line)
        found = []
        for name, now, then in differences(self._identity, saved):
            if self._model.family == "llama" and name in FREE:
                self._say(
                    f"the checkpoint of step {step} was written with {name}={shown(then)}: this "
                    f"run goes on from it with {now}"
                )
            else:
                found.append(f"{name}={shown(then)}, but this run has {now}")
        if found:
            raise UserError(
                f"the checkpoint in {self._folder} was written with {'; with '.join(found)}: "
                "use the same settings, or start another run with --workdir."
            )

    def _save(self, step: int, parts: Sequence[Fragment], number: int) -> None:
        """Writes the arrays of this process. Process 0 finishes the checkpoint when all have
        written.
        """
        saving = self._folder / f"{step}{manifest.SAVING}"
        try:
            saving.mkdir(exist_ok=True)
            written, failure = write_arrays(saving, parts), ""
        except Exception as error:  # of any type, since the others wait to be told
            written, failure = {}, brief(error)

        def finish(answers: list[str]) -> str:
            known: manifest.Digests = {}
            for answer in map(json.loads, answers):
                if answer["failure"]:
                    return answer["failure"]
                known |= answer["files"]
            try:
                data = self.data_at(step) if self.data_at else None
                manifest.finish(saving, step, self._identity, known, data, self._block)
            except Exception as error:  # of any type, as above
                return brief(error)
            return ""

        answer = json.dumps({"failure": failure, "files": written})
        if failure := gathered(f"checkpoint {number}", answer, finish):
            raise OSError(failure)
        if jax.process_index() == 0:
            self._remove_old()

    def _remove_old(self) -> None:
        for old in manifest.list_steps(self._folder)[self._config.keep :]:
            try:
                manifest.remove(self._folder / str(old))
            except OSError as error:
                self._say(f"the old checkpoint of step {old} is not removed ({brief(error)})")

    def _writing(self) -> AbstractContextManager[None]:
        return as_user_error(
            lambda error: (
                f"cannot write checkpoints to {self._folder} ({brief(error)}): make it writable, "
                "see that the disk has space and that all hosts share it, or choose another folder "
                "with --workdir."
            )
        )


def warn(text: str) -> None:
    """Prints a warning to stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)


def newest_sound(
    workdir: Path, step: int | None = None, say: Callable[[str], None] = warn
) -> tuple[Path, ModelConfig]:
    """Returns the folder and the model of the newest sound checkpoint of a run, or of the
    checkpoint of `step` if that is given. Changes nothing. Says which newer ones are damaged.

    Raises `UserError` if there is none, or if the run is a stranger's and a link leads out of it.
    """
    check_links(workdir)
    folder = workdir / CHECKPOINTS
    steps = manifest.list_steps(folder) if folder.is_dir() else []
    if step is not None and step not in steps:
        found = ", ".join(map(str, steps)) or "none"
        raise UserError(f"--step={step} is not in {folder}: it has these steps, {found}.")
    damage, damaged = "it has none", []
    for number in steps if step is None else [step]:
        try:
            found = folder / str(number), model_of(manifest.check(folder / str(number)))
        except (DamagedError, OSError) as error:
            damage = f"{number}: {brief(error)}"
            damaged.append(damage)
            continue
        if damaged:
            say(
                f"{folder} has newer checkpoints that are damaged ({'; '.join(damaged)}): the one "
                f"of step {number} is taken, which is older."
            )
        return found
    raise UserError(
        f"--workdir={workdir} has no sound checkpoint ({damage}): name the folder of a run that "
        "has saved one."
    )


def write_checkpoint(
    folder: Path, step: int, model: ModelConfig, parts: Iterable[Fragment]
) -> None:
    """Writes a checkpoint from one process, part by part, in the format of `Checkpoints.save`. If
    it fails, removes what it has written.
    """
    saving = folder / f"{step}{manifest.SAVING}"
    saving.mkdir(parents=True)
    try:
        written: manifest.Digests = {}
        for part in parts:
            written |= write_arrays(saving, [part])
        manifest.finish(saving, step, identity_of(model), written)
    except BaseException:
        shutil.rmtree(saving, ignore_errors=True)
        raise


def block_change(block: str, now: str | None, then: str | None) -> str:
    """Returns a line if a checkpoint was written with another file of the user's own block; else an
    empty one. The digests are None where they are not known.
    """
    if now is None or then is None or now == then:
        return ""
    return (
        f"the file of config.model.block={block} has SHA-256 {now}, but the checkpoint was written "
        f"with {then}: if more than comments has changed, this is another model, and what it "
        "computes is wrong"
    )


def _digest_or_none(model: ModelConfig) -> str | None:
    try:
        return block_digest(model)
    except OSError:
        return None


def _completed(identity: dict[str, Any]) -> dict[str, Any]:
    """Completes the identity of an old checkpoint: settings added since then get their defaults,
    which do what the old model did.
    """
    try:
        return identity | identity_of(ModelConfig(**identity["model"]))
    except (KeyError, TypeError):
        return identity


def identity_of(model: ModelConfig) -> dict[str, Any]:
    """Returns the settings that a checkpoint is bound to."""
    return {"model": asdict(resolved_model(model))}
