"""metrics.jsonl and the events of TensorBoard."""

import json
import math
import resource
import struct
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event

from tpipe_jax.config.settings import Config, MetricsConfig
from tpipe_jax.errors import UserError
from tpipe_jax.reporting.metrics import Metrics


def open_metrics(workdir: Path, first_step: int = 0) -> Any:
    return closing(Metrics(workdir, first_step))


def read_lines(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def read_events(workdir: Path) -> Iterator[Event]:
    """TFRecord framing: 8 bytes of length, 4 of checksum, the record, 4 of its checksum."""
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack_from("<Q", data)
            yield Event.FromString(data[12 : 12 + length])
            data = data[12 + length + 4 :]


def shown_by_tensorboard(workdir: Path) -> list[tuple[int, str, float]]:
    """The scalars that TensorBoard itself reads."""
    events = EventAccumulator(str(workdir / "tensorboard"), {"scalars": 0}).Reload()
    return sorted(
        (event.step, tag, event.value)
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    )


def test_a_line_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with open_metrics(tmp_path / "run") as metrics:
        metrics.write(10, {"loss": 2.5, "learning_rate": 1e-3})
        metrics.write(20, {"loss": 2.25, "eval_loss": 2.375})
        assert read_lines(tmp_path / "run") == [
            {"step": 10, "loss": 2.5, "learning_rate": 1e-3},
            {"step": 20, "loss": 2.25, "eval_loss": 2.375},
        ]


def test_tensorboard_has_the_same_numbers_at_once(tmp_path: Path) -> None:
    with open_metrics(tmp_path) as metrics:
        metrics.write(10, {"loss": 2.5, "tokens_per_second": 4096.0})
        metrics.write(20, {"loss": 2.25})
        assert shown_by_tensorboard(tmp_path) == [
            (10, "loss", 2.5),
            (10, "tokens_per_second", 4096.0),
            (20, "loss", 2.25),
        ]
    # Without this version TensorBoard does not purge at the start of a session.
    assert next(read_events(tmp_path)).file_version == "brain.Event:2"
    assert all(event.wall_time > 1.7e9 for event in read_events(tmp_path))


def test_not_a_number_is_null_in_json(tmp_path: Path) -> None:
    with open_metrics(tmp_path) as metrics:
        metrics.write(1, {"loss": math.nan, "grad_norm": math.inf, "step_seconds": 0.5})
    assert read_lines(tmp_path) == [
        {"step": 1, "loss": None, "grad_norm": None, "step_seconds": 0.5}
    ]
    grad_norm, loss, _ = (value for _, _, value in shown_by_tensorboard(tmp_path))
    assert math.isnan(loss)
    assert grad_norm == math.inf


@pytest.mark.parametrize("torn", ["", '{"step": 40, "lo', '{"step": 40, "loss": 1.0}'])
def test_resuming_leaves_neither_gaps_nor_doubles(tmp_path: Path, torn: str) -> None:
    with open_metrics(tmp_path) as metrics:
        for step in (10, 20, 30):
            metrics.write(step, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    with open_metrics(tmp_path, first_step=20) as metrics:
        for step in (30, 40):
            metrics.write(step, {"loss": 2.0})
    expected = [(10, 1.0), (20, 1.0), (30, 2.0), (40, 2.0)]
    assert [(line["step"], line["loss"]) for line in read_lines(tmp_path)] == expected
    assert [(step, value) for step, _, value in shown_by_tensorboard(tmp_path)] == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_file_with_other_content_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"epoch": 1}\n{"step": 50}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl .*--workdir"):
        Metrics(tmp_path, first_step=0)
    assert path.read_text() == '{"epoch": 1}\n{"step": 50}\n'


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*/file/.*Not a directory.*--workdir"):
        Metrics(tmp_path / "file" / "run", first_step=0)


def test_full_disk(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, first_step=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # no file may grow further; for root too
    try:
        with pytest.raises(UserError, match=r"cannot write .*/metrics\.jsonl .*--workdir"):
            metrics.write(1, {f"number {i}": 0.0 for i in range(20)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    metrics.close()


class Tracker:
    """Stands in for a run of Weights & Biases, which has no server here."""

    def __init__(self, **options: Any) -> None:
        self.options, self.logged, self.is_finished = options, [], False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.is_finished = True


def test_weights_and_biases_get_the_numbers_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made: list[Tracker] = []
    module = SimpleNamespace(init=lambda **options: made.append(Tracker(**options)) or made[-1])
    monkeypatch.setitem(sys.modules, "wandb", module)
    config = Config(metrics=MetricsConfig(wandb="project"))
    for first_step in (0, 10):
        with closing(Metrics(tmp_path / "run", first_step, config)) as metrics:
            metrics.write(first_step + 10, {"loss": 2.5})
    assert [tracker.logged for tracker in made] == [[(10, {"loss": 2.5})], [(20, {"loss": 2.5})]]
    assert all(tracker.is_finished for tracker in made)
    for tracker in made:
        options = tracker.options
        assert (options["project"], options["name"]) == ("project", "run")
        assert options["id"] == made[0].options["id"] != ""
        assert options["config"]["metrics"]["wandb"] == "project"


@pytest.mark.parametrize("is_there", [False, True])
def test_weights_and_biases_that_do_not_work(
    is_there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(**options: Any) -> None:
        raise RuntimeError("no network")

    module = SimpleNamespace(init=fail) if is_there else None
    monkeypatch.setitem(sys.modules, "wandb", module)
    sentence = "no network.*WANDB_MODE=offline" if is_there else "needs the package wandb"
    with pytest.raises(UserError, match=rf"config\.metrics\.wandb.*{sentence}"):
        Metrics(tmp_path, 0, Config(metrics=MetricsConfig(wandb="project")))
