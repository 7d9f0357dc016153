"""Whole runs: how tests start them, and what they read of what is left behind."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

import zarr_files
from tpipe_jax.config import Config
from tpipe_jax.console import Console

ROOT = Path(__file__).parents[1]


class Lines(Console):
    """Keeps what is said; `on_step` is called when a step is logged."""

    def __init__(self, on_step=lambda step: None):
        super().__init__(is_quiet=True)
        self.said: list[str] = []
        self._on_step = on_step

    def say(self, text: str) -> None:
        self.said.append(text)

    def show_progress(self, step: int, metrics: dict[str, float]) -> None:
        super().show_progress(step, metrics)
        self._on_step(step)


def metrics(workdir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def saved_arrays(workdir: Path, step: int) -> dict[str, np.ndarray]:
    return zarr_files.read_all(workdir / "checkpoints" / str(step))


def changed(config: Config, **sections: dict[str, object]) -> Config:
    return dataclasses.replace(
        config,
        **{
            name: dataclasses.replace(getattr(config, name), **fields)
            for name, fields in sections.items()
        },
    )


def launch(*args: str, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "launch/multihost.py", *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )
