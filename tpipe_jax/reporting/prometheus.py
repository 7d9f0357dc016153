"""The numbers of a run for Prometheus, which asks process 0 for them over HTTP.

    tpipe_loss{run="mine"} 2.31
    tpipe_checkpoint_age_seconds{run="mine"} 41.7

Each number of a line in metrics.jsonl has the value of the newest line.
"""

import importlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tpipe_jax.config.settings import Config
from tpipe_jax.errors import UserError

Age = Callable[[], float]


def check_exporter(config: Config) -> None:
    """Raises `UserError` if config.metrics.port is set and cannot be served. For process 0."""
    if config.metrics.port is not None:
        Exporter(config, Path(), 0, None).close()


class Exporter:
    """A server of the newest numbers, on config.metrics.port at all addresses of this host."""

    def __init__(self, config: Config, workdir: Path, num_restarts: int, age: Age | None) -> None:
        """`num_restarts` says how often the run was started before; `age` returns the seconds since
        its newest checkpoint, NaN if it has none.
        """
        port = config.metrics.port
        try:
            self._client: Any = importlib.import_module("prometheus_client")
        except ImportError:
            raise UserError(
                f"config.metrics.port={port} needs the package prometheus_client: install it with "
                "pip install tpipe_jax[prometheus], or leave it out."
            ) from None
        self._run, self._registry = workdir.resolve().name, self._client.CollectorRegistry()
        self._gauges: dict[str, Any] = {}
        restarts = self._gauge("restarts", "How often the run was started again")
        restarts.set(num_restarts)
        if age:
            text = "Seconds since the newest checkpoint was finished"
            self._gauge("checkpoint_age_seconds", text).set_function(age)
        try:
            self._server, self._thread = self._client.start_http_server(
                port, registry=self._registry
            )
        except OSError as error:
            raise UserError(
                f"config.metrics.port={port} cannot be listened at ({error.strerror}): set another "
                "port, or leave it out."
            ) from None

    def write(self, step: int, values: dict[str, float]) -> None:
        """Shows the values after `step` steps."""
        for name, value in {"step": step, **values}.items():
            self._gauge(name, f"{name} in metrics.jsonl").set(value)

    def close(self) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge(self, name: str, text: str) -> Any:
        if name not in self._gauges:
            made = self._client.Gauge(f"tpipe_{name}", text, ["run"], registry=self._registry)
            self._gauges[name] = made.labels(self._run)
        return self._gauges[name]


def newest_age(times: Callable[[], list[float]]) -> Age:
    """Returns a function that returns the seconds since the last of these times of the clock; NaN
    if there is none.
    """

    def age() -> float:
        try:
            return time.time() - max(times())
        except (OSError, ValueError):
            return math.nan

    return age
