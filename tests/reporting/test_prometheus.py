"""The numbers of a run as Prometheus gets them, over HTTP."""

import os
import re
import socket
import sys
import time
import urllib.request
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from tpipe_jax.checkpoint.manifest import MANIFEST_DIGEST, finish_times
from tpipe_jax.config.settings import Config, MetricsConfig
from tpipe_jax.errors import UserError
from tpipe_jax.reporting.metrics import Metrics
from tpipe_jax.reporting.prometheus import check_exporter, newest_age

pytest.importorskip("prometheus_client")


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def asked(port: int) -> dict[str, float]:
    """All numbers, by name, of a run whose workdir is called `run`."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        name: float(value)
        for name, value in re.findall(r'^tpipe_(\w+)\{run="run"\} (\S+)$', text, re.MULTILINE)
    }


def test_it_answers_with_the_newest_line(port: int, tmp_path: Path):
    config, workdir = Config(metrics=MetricsConfig(port=port)), tmp_path / "run"
    checkpoints = workdir / "checkpoints"
    age = newest_age(partial(finish_times, checkpoints))
    for restarts, first_step in enumerate((0, 20)):
        with closing(Metrics(workdir, first_step, config, age)) as metrics:
            for step in (first_step + 10, first_step + 20):
                metrics.write(step, {"loss": step / 8, "tokens_per_second": 100.0, "mfu": 0.25})
                if step == 20:
                    assert "nan" in str(asked(port)["checkpoint_age_seconds"])
                    (checkpoints / "20").mkdir(parents=True)
                    (checkpoints / "20" / MANIFEST_DIGEST).write_text("")
                    then = time.time() - 100
                    os.utime(checkpoints / "20" / MANIFEST_DIGEST, (then, then))
            found = asked(port)
            assert found.pop("checkpoint_age_seconds") == pytest.approx(100, abs=30)
            expected = {"step": step, "loss": step / 8, "tokens_per_second": 100, "mfu": 0.25}
            assert found == {**expected, "restarts": restarts}
    with pytest.raises(OSError, match="refused"):
        asked(port)


def test_a_port_that_is_taken_is_named_before_training(port: int):
    config = Config(metrics=MetricsConfig(port=port))
    check_exporter(config)
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        with pytest.raises(UserError, match=rf"metrics\.port={port} cannot be listened at"):
            check_exporter(config)


def test_without_its_package_a_sentence_says_so(port: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UserError, match=r"needs the package prometheus_client.*\[prometheus\]"):
        check_exporter(Config(metrics=MetricsConfig(port=port)))
    check_exporter(Config())
