"""Whole runs: how tests start them, and what they read of what is left behind."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from support import zarr_files
from tpipe_jax.commands.train import train
from tpipe_jax.config.settings import (
    CheckpointConfig,
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    PlanConfig,
    TrainConfig,
)
from tpipe_jax.reporting.console import Console

ROOT = Path(__file__).parents[2]


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


def small_config(folder: Path) -> Config:
    """A run of a few steps on two stages; its text is in the folder."""
    text = folder / "text.txt"
    text.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(200)))
    return Config(
        model=ModelConfig(num_layers=3, d_model=16, num_heads=2, seq_len=16),
        mesh=MeshConfig(pipe=2),
        plan=PlanConfig(token_slices="6,6,4", batch_slices="uniform:1"),
        train=TrainConfig(
            num_steps=6, batch_size=4, log_every=1, eval_every=4, eval_batches=2, sample_tokens=0
        ),
        data=DataConfig(train=str(text)),
        checkpoint=CheckpointConfig(every=100),
    )


def run(
    config: Config, workdir: Path, on_step=lambda step: None, profiled: range | None = None
) -> list[str]:
    """Trains in this process; returns what is said."""
    console = Lines(on_step)
    train(config, workdir, jax.devices()[: config.mesh.num_devices], console, profiled)
    return console.said


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
