"""The numbers of a run, as lines of `metrics.jsonl` and as TensorBoard events.

Each write reaches the files before it returns, so a killed run keeps what it logged. The events are
written here, record by record. The usual writers leave this to a thread; a full disk ends that
thread, and the run then waits for it without end.
"""

import contextlib
import importlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import (
    Event,  # pyrefly: ignore[missing-module-attribute]
    SessionLog,  # pyrefly: ignore[missing-module-attribute]
)
from tensorboard.compat.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute]
from tensorboard.summary.writer.record_writer import RecordWriter

from tpipe_jax.config.settings import Config, to_dict
from tpipe_jax.errors import UserError, brief
from tpipe_jax.files import as_user_error
from tpipe_jax.json_files import parse_json
from tpipe_jax.reporting.loss_plot import FILE, draw_losses
from tpipe_jax.reporting.prometheus import Age, Exporter

DRAW_SECONDS = 20  # between two pictures of the losses


class Metrics:
    """`metrics.jsonl` and `tensorboard/` in `workdir`, of a run that has done `first_step` steps.

    A resumed run logs the steps after its checkpoint again. So lines of steps after `first_step`
    are dropped, and TensorBoard is told to drop its events of them.

    If the config names a project of Weights & Biases or a port for Prometheus, these get the
    numbers too, and Prometheus `checkpoint_age`. Raises `UserError`, as `write` and `close` do, if
    a file cannot be written.
    """

    def __init__(
        self,
        workdir: Path,
        first_step: int,
        config: Config | None = None,
        checkpoint_age: Age | None = None,
    ) -> None:
        self._path, self._drawn = workdir / "metrics.jsonl", time.monotonic()
        events = workdir / "tensorboard"
        with self._writing():
            events.mkdir(parents=True, exist_ok=True)
            num_starts = len(list(events.glob("events.out.tfevents.*")))
            _drop_after(first_step, self._path)
            name = f"events.out.tfevents.{time.time_ns()}"  # nanoseconds, so that it is new
            self._events = RecordWriter((events / name).open("xb"))
            self._lines = self._path.open("a", encoding="utf-8")
            self._write_event(Event(file_version="brain.Event:2"))
            purge = SessionLog(status=SessionLog.START)
            self._write_event(Event(step=first_step + 1, session_log=purge))
        self._tracker: Any = None
        self._exporter: Exporter | None = None
        try:
            if config and config.metrics.port is not None:
                self._exporter = Exporter(config, workdir, num_starts, checkpoint_age)
            if config and config.metrics.wandb:
                self._tracker = _tracker(config, workdir)
        except UserError:
            self.close()
            raise

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends the values after `step` steps. NaN and infinity, unknown to JSON, become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        with self._writing():
            self._lines.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
            self._lines.flush()
            self._write_event(Event(step=step, summary=Summary(value=scalars)))
        if self._exporter:
            self._exporter.write(step, values)
        if self._tracker:
            with _tracking():
                self._tracker.log(values, step=step)

    def draw(self, is_last: bool = False) -> str:
        """Draws loss.png, but not often, since that takes a part of a second.

        Returns what went wrong, if something did: a picture is no reason to end a run.
        """
        if is_last or time.monotonic() - self._drawn > DRAW_SECONDS:
            self._drawn = time.monotonic()
            try:
                draw_losses([self._path.parent], self._path.with_name(FILE))
            except Exception as error:
                return f"{FILE} could not be drawn: {brief(error)}"
        return ""

    def close(self) -> None:
        """Closes the files."""
        if self._exporter:
            self._exporter.close()
        with self._writing(), contextlib.closing(self._events):
            self._lines.close()
        if self._tracker:
            with _tracking():
                self._tracker.finish()

    def _write_event(self, event: Event) -> None:
        event.wall_time = time.time()
        self._events.write(event.SerializeToString())
        self._events.flush()

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return as_user_error(
            lambda error: (
                f"cannot write {error.filename or self._path} ({error.strerror}): make it writable "
                "and see that the disk has space, or choose another folder with --workdir."
            )
        )


def check_tracker(config: Config) -> None:
    """Raises `UserError` if config.metrics.wandb is set and its package is missing."""
    if config.metrics.wandb is None:
        return
    try:
        importlib.import_module("wandb")
    except ImportError:
        raise UserError(
            f"config.metrics.wandb={config.metrics.wandb} needs the package wandb: install it with "
            "pip install tpipe_jax[wandb], or leave it out."
        ) from None


def _tracker(config: Config, workdir: Path) -> Any:
    """Opens a run of Weights & Biases; a resumed run of the workdir opens the same one again."""
    check_tracker(config)
    wandb, kept = importlib.import_module("wandb"), workdir / "wandb.id"
    with _tracking():
        workdir.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            kept.write_text(secrets.token_hex(8), encoding="utf-8")
        return wandb.init(
            project=config.metrics.wandb,
            id=kept.read_text(encoding="utf-8"),
            resume="allow",
            dir=workdir,
            name=workdir.name,
            config=to_dict(config),
        )


@contextlib.contextmanager
def _tracking() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # wandb's own, and those of the network
        raise UserError(
            f"config.metrics.wandb cannot be written to ({error}): log in with wandb login, set "
            "WANDB_MODE=offline, or leave it out; the same command continues."
        ) from error


def _drop_after(last_step: int, path: Path) -> None:
    """Removes the lines of steps after `last_step`, and the torn last line that a kill leaves."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    try:
        steps = [parse_json(line)["step"] for line in whole]
        if not all(type(step) is int for step in steps):
            raise ValueError("a step is no whole number")
        kept = [line for line, step in zip(whole, steps, strict=True) if step <= last_step]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} has lines that are no metrics of a run: move it away, or choose another "
            "folder with --workdir."
        ) from error
    if kept != lines:
        # Replaced in one step, so that a kill cannot lose the lines that stay.
        new = path.with_suffix(".jsonl.new")
        new.write_bytes(b"".join(kept))
        os.replace(new, path)
