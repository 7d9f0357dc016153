"""Checkpoints of a run: a thin layer over Orbax that saves in the background.

Each checkpoint holds the settings that it is bound to, and the state of another model is refused.
"""

import contextlib
import inspect
import json
import logging
import os
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from tpipe_jax.config import CheckpointConfig, UserError

PyTree = Any


class Checkpoints:
    """The newest `config.keep` checkpoints of a run, each in a folder named by its step.

    `identity` holds the settings that a state is bound to, nested by section as in `Config`. Every
    process of a run constructs and calls this alike. Raises `UserError` if `folder` is unwritable.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, identity: dict[str, Any]) -> None:
        self._folder = folder
        self._identity = json.loads(json.dumps(identity))
        logging.getLogger("absl").addFilter(_is_for_the_user)
        _hush_abandoned_transfers()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(config.keep),
            # What a killed run has half written can never be read, but takes as much space.
            cleanup_tmp_directories=True,
            # Else a folder that cannot be made keeps the process from exiting for 5 minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError("permission denied")
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest_step(self) -> int | None:
        """The newest step whose save is finished, or None."""
        self.wait()
        self._manager.reload()
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree) -> None:
        """Saves arrays in the background; does nothing if `step` is saved already.

        The caller may donate `state` as soon as this returns: Orbax has copied it to the host by
        then. On a CPU the copy is a view, and XLA does not reuse memory that has a view on it.

        Raises `UserError` if this save cannot start, or if the one before it has failed.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            identity=ocp.args.JsonSave(self._identity), state=ocp.args.StandardSave(state)
        )
        with self._writing():
            self._manager.save(step, args=items, force=True)

    def newest_step(self) -> int | None:
        """The `latest_step`. Raises `UserError` if it has another identity, or is damaged."""
        step = self.latest_step()
        if step is None:
            return None
        saved = dict(_settings(self._read(step, identity=ocp.args.JsonRestore()).identity))
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
        return step

    def restore(self, like: PyTree) -> PyTree:
        """The newest state, bitwise as saved, in the shardings of `like`.

        There must be a `newest_step`. Raises `UserError` if it is damaged.
        """
        step = self.newest_step()
        assert step is not None, f"no checkpoint in {self._folder}"
        return self._read(step, state=ocp.args.StandardRestore(like)).state

    def wait(self) -> None:
        """Returns when no save is under way. Raises `UserError` if the last one has failed."""
        with self._writing(ValueError):  # TensorStore's error for a full disk
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits as `wait` does, and ends the background threads."""
        with contextlib.closing(self._manager):
            self.wait()

    def _read(self, step: int, **items: ocp.args.CheckpointArgs) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # a bare Exception is what Orbax raises for a damaged array
            raise UserError(
                f"the checkpoint in {self._folder / str(step)} cannot be read ({_brief(error)}): "
                "move that folder away to continue from an older one, or start another run with "
                "--workdir."
            ) from error

    @contextlib.contextmanager
    def _writing(self, *errors: type[Exception]) -> Iterator[None]:
        try:
            yield
        except (OSError, *errors) as error:
            raise UserError(
                f"cannot write checkpoints to {self._folder} ({_brief(error)}): make it writable "
                "and see that the disk has space, or choose another folder with --workdir."
            ) from error


def _settings(identity: dict[str, Any], prefix: str = "config") -> Iterator[tuple[str, Any]]:
    for name, value in identity.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}", value


def _brief(error: Exception) -> str:
    return textwrap.shorten(str(error), 160, placeholder=" ...")


def _is_for_the_user(record: logging.LogRecord) -> bool:
    """Of what Orbax logs: its warnings, not its progress nor the errors which it raises as well."""
    from_orbax = record.pathname.startswith(os.path.dirname(ocp.__file__))
    return not from_orbax or (record.levelno >= logging.WARNING and not record.exc_info)


def _hush_abandoned_transfers() -> None:
    """Hushes what Python reports of reads and writes that Orbax drops once one of them has failed.

    They may end long after the failure, so it hushes them for good. asyncio logs those that fail
    as well when they are collected.
    """
    logging.getLogger("asyncio").addFilter(_is_not_abandoned)
    report = sys.unraisablehook

    def report_others(unraisable: Any) -> None:
        if not (
            inspect.iscoroutine(unraisable.object) or "loop is closed" in str(unraisable.exc_value)
        ):
            report(unraisable)

    if getattr(report, "__name__", "") != report_others.__name__:
        sys.unraisablehook = report_others


def _is_not_abandoned(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()
