"""The flags of each program in launch/, beside the settings of a run."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

from tpipe_jax.config.fields import Count, CountOrZero, NonNegative, Range
from tpipe_jax.config.settings import Config, MeshConfig, ScheduleName


@dataclass(frozen=True)
class ProcessFlags:
    """The processes of a run. A scheduler that jax knows, such as Slurm, needs none of these."""

    coordinator: str | None = None
    """HOST:PORT at which process 0 listens and the others find it."""
    num_processes: Count | None = None
    """Processes of the run, on all hosts."""
    process_id: CountOrZero | None = None
    """Which of them this one is, from 0."""
    local_device_ids: tuple[int, ...] | None = None
    """The GPUs of its host that this process uses; all if left out."""
    local_processes: Count | None = None
    """Starts so many processes on this machine instead, and relays what they print."""
    max_restarts: CountOrZero = 0
    """How often processes that have failed are started again, from the last checkpoint; each host
    its own, where a scheduler starts them."""
    join_seconds: Count = 300
    """How long a process waits for the others at the start."""


@dataclass(frozen=True)
class Flags:
    """Trains a GPT through a token-sliced pipeline.

    --config=FILE names a Python file with a function get_config() that returns the settings; the
    flags below change single ones. Running the same command again continues from the last
    checkpoint in the workdir.
    """

    config: Config
    workdir: Path
    """Folder for config.json, plan.json, metrics, checkpoints and timeline.png, seen by all."""
    processes: tyro.conf.OmitArgPrefixes[ProcessFlags] = ProcessFlags()
    profile: str | None = None
    """START:STOP, the steps, both included, of which training leaves a profile in the workdir."""


@dataclass(frozen=True)
class FilePlanFlags:
    """Plans slices from measured latencies alone."""

    latency: Path
    """A latency.json: unit_tokens, and seconds as forward and backward [batch - 1][slice units - 1]
    [context units], null where a slice is not allowed."""
    num_stages: Count
    """Pipeline stages."""
    batch_size: Count
    """Sequences of a data shard."""
    seq_len: Count
    """Tokens of a sequence."""
    stage_factors: tuple[float, ...] | None = None
    """The time of each stage over those of the file, all alike if left out."""
    schedule: Literal["auto", ScheduleName] = "auto"
    """As config.plan.schedule."""
    num_layers: int | None = None
    """Layers of the model, without which interleaved is planned only if it is asked for."""
    chunks: int | None = None
    """As config.plan.chunks."""
    memory_limit_gib: float | None = None
    """What a step may use of a device's memory, if the file tells what it needs."""
    workdir: Path = Path("runs/plan")
    """Folder for plan.json and plan.png."""


@dataclass(frozen=True)
class CheckpointsFlags:
    """Lists the checkpoints of a run, and whether each is as it was written."""

    workdir: tyro.conf.Positional[Path]
    """The run's folder."""


@dataclass(frozen=True)
class ImportFlags:
    """Makes a workdir with the weights of a Hugging Face folder of GPT-2 as its step 0."""

    source: Annotated[Path, tyro.conf.arg(name="from")]
    """The folder, with config.json and model.safetensors, in one file or several."""
    workdir: Path
    """A folder for a new run."""


@dataclass(frozen=True)
class ExportFlags:
    """Writes the weights of a run as a Hugging Face folder of GPT-2."""

    workdir: Path
    """The run's folder."""
    to: Path
    """A folder that does not exist yet."""
    step: CountOrZero | None = None
    """Of the checkpoint; the newest if left out."""


@dataclass(frozen=True)
class GenerateFlags:
    """Continues a text with the model of a run."""

    workdir: Path
    """The run's folder."""
    prompt: str | None = None
    """The text."""
    tokenizer: str | None = None
    """Of the text: bytes or a tokenizer.json; config.data.tokenizer of the run if left out."""
    prompt_ids: str | None = None
    """Its tokens instead, as 464,3290."""
    max_tokens: Count = 200
    """How many tokens follow."""
    temperature: NonNegative = 0.7
    """What logits are divided by before a token is drawn; 0 takes the most likely one always."""
    top_p: Annotated[float, Range(0, high=1)] = 1.0
    """Draws from the most likely tokens that together have this probability."""
    seed: CountOrZero = 0
    """Of the draws."""
    step: CountOrZero | None = None
    """Of the checkpoint; the newest if left out."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """The devices that share the work."""


@dataclass(frozen=True)
class EvaluateFlags:
    """Measures the loss of a run's model on data."""

    workdir: Path
    """The run's folder."""
    data: str | None = None
    """What config.data.train may name; what the run holds out if left out."""
    tokenizer: str | None = None
    """Of text: bytes or a tokenizer.json; config.data.tokenizer of the run if left out."""
    batch_size: Count = 8
    """Sequences that a data shard works on together."""
    step: CountOrZero | None = None
    """Of the checkpoint; the newest if left out."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """The devices that share the work."""


@dataclass(frozen=True)
class TokenizeFlags:
    """Turns text into token shards to train on."""

    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Text files, files of records (.jsonl, .parquet, .array_record), and folders of them."""
    out: Path
    """A folder that does not exist yet."""
    tokenizer: str = "bytes"
    """bytes, or the tokenizer.json of a Hugging Face model."""
    train_bpe: Count | None = None
    """Makes a tokenizer of so many tokens first, from the same text, as OUT.tokenizer.json."""
    num_workers: Count = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that work at the same time."""
    field: str = "text"  # the last one, since it hides the function of that name
    """Where a record of JSON lines or Parquet has its document."""


AfterFlags = TypeVar("AfterFlags", GenerateFlags, EvaluateFlags)
