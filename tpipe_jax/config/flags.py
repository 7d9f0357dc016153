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
    """Number of this process, from 0."""
    local_device_ids: tuple[int, ...] | None = None
    """GPUs of the host that this process uses; all if left out."""
    local_processes: Count | None = None
    """Starts this many processes on this machine instead, and relays what they print."""
    max_restarts: CountOrZero = 0
    """How often failed processes are started again, from the last checkpoint. Where a scheduler
    starts the processes, each host restarts its own."""
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
    """Folder for config.json, plan.json, metrics, checkpoints, timeline.png; seen by all hosts."""
    processes: tyro.conf.OmitArgPrefixes[ProcessFlags] = ProcessFlags()
    profile: str | None = None
    """START:STOP, the first and the last step of the profile that is written to the workdir."""


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
    """Time of each stage divided by the times in the file; if left out, in proportion to the layers
    of the stages, or all 1 without num_layers."""
    schedule: Literal["auto", ScheduleName] = "auto"
    """As config.plan.schedule."""
    num_layers: int | None = None
    """Layers of the model; if left out, interleaved is planned only when schedule names it."""
    chunks: int | None = None
    """As config.plan.chunks."""
    memory_limit_gib: float | None = None
    """Memory of a device that a step may use; needs a file that holds measured memory."""
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
    """Step of the checkpoint; the newest if left out."""


@dataclass(frozen=True)
class GenerateFlags:
    """Continues a text with the model of a run."""

    workdir: Path
    """The run's folder."""
    prompt: str | None = None
    """The text."""
    tokenizer: str | None = None
    """Tokenizer of the text: bytes or a tokenizer.json; config.data.tokenizer of the run if left
    out."""
    prompt_ids: str | None = None
    """Token ids to continue instead of a text, as 464,3290."""
    max_tokens: Count = 200
    """Number of tokens to generate."""
    temperature: NonNegative = 0.7
    """Divides the logits before a token is drawn; 0 always takes the most likely token."""
    top_p: Annotated[float, Range(0, high=1)] = 1.0
    """Tokens are drawn from the most likely ones that together have this probability."""
    seed: CountOrZero = 0
    """Seed of the draws."""
    step: CountOrZero | None = None
    """Step of the checkpoint; the newest if left out."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """The devices that share the work."""


@dataclass(frozen=True)
class EvaluateFlags:
    """Measures the loss of a run's model on data."""

    workdir: Path
    """The run's folder."""
    data: str | None = None
    """Data, named as in config.data.train; the held-out data of the run if left out."""
    tokenizer: str | None = None
    """For text: bytes or a tokenizer.json; config.data.tokenizer of the run if left out."""
    batch_size: Count = 8
    """Sequences that a data shard works on together."""
    step: CountOrZero | None = None
    """Step of the checkpoint; the newest if left out."""
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
    """First makes a tokenizer of this many tokens from the same text, as OUT.tokenizer.json."""
    num_workers: Count = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that work at the same time."""
    field: str = "text"  # last, since it hides the function `field`
    """Field that holds the document in a record of JSON lines or Parquet."""


TrainedModelFlags = TypeVar("TrainedModelFlags", GenerateFlags, EvaluateFlags)
