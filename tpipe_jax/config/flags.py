"""The flags of each program in launch/, beside the settings of a run."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from tpipe_jax.config.fields import Count, CountOrZero, NonNegative, Range
from tpipe_jax.config.settings import BUILT_IN, Config, MaxRecord, MeshConfig, ScheduleName

Gpu = Literal["v100", "v100-32", "a100", "a100-40", "h100", "h200", "b200"]


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
class _RunFlags:
    config: Config
    workdir: Path
    """Folder of the run: config.json, plan.json, metrics, checkpoints and pictures. All hosts must
    see it. If it holds a run, and --config is left out, that run goes on with its own settings."""


@dataclass(frozen=True)
class Flags(_RunFlags):
    """Trains a GPT through a pipeline of token slices, or goes on with a run.

    --config=NAME is a config that comes with the package (quickstart, gpt3_1b, gpt3_13b, gpt3_44b,
    gpt3_175b), --config=FILE a Python file with a function get_config(), --config=RUN/config.json a
    run. The flags below change single settings.
    """

    processes: tyro.conf.OmitArgPrefixes[ProcessFlags] = ProcessFlags()
    profile: str | None = None
    """START:STOP, the first and the last step of the profile that is written to the workdir."""


@dataclass(frozen=True)
class PlanFlags(_RunFlags):
    """Plans the slices of a model, without training: on these devices, which are measured for it.

    Writes plan.json and plan.png into the workdir. A run there uses the plan's measurements; other
    runs take the plan with --config.plan.file=plan.json. Two other forms need no device. --gpu=NAME
    plans for GPUs that are not here, and --latency=FILE plans from measured latencies;
    --gpu --help and --latency --help list their flags.
    """

    processes: tyro.conf.OmitArgPrefixes[ProcessFlags] = ProcessFlags()


@dataclass(frozen=True)
class GpuPlanFlags(_RunFlags):
    """Plans for GPUs that are not here: does it fit, which slices, how long is a step?

    Predicts times from the programs that XLA compiles for these GPUs. Writes plan.json,
    latency.json and plan.png into the workdir; the cluster trains with
    --config.plan.file=plan.json. With --config.mesh=auto all ways to divide the GPUs are compared,
    and drawn in meshes.png.
    """

    gpu: Gpu = "h100"
    """The GPUs: 16 GB for v100, 80 GB for a100, unless the name says another size."""
    hosts: Count | None = None
    """Hosts that share the GPUs evenly; if left out, as many as config.mesh needs."""
    gpus_per_host: Count = 8
    """GPUs of a host, joined by NVLink."""
    tokens: Annotated[float, Range(1)] | None = None
    """Tokens to train on, such as 300e9, to tell the days that takes."""
    bandwidth: Annotated[float, Range(0.001)] | None = None
    """Gbit/s of a host to others, in one direction; if left out, what is typical for the GPU."""
    latency_us: NonNegative = 20.0
    """Microseconds of an exchange between hosts."""


@dataclass(frozen=True)
class DoctorFlags(_RunFlags):
    """Shows versions, devices, memory and flags, and what a run with these settings would use here.

    Changes nothing. Put its output into a bug report.
    """


@dataclass(frozen=True)
class CompileFlags(_RunFlags):
    """Compiles the training step for GPUs or TPUs that are not here: does it fit, what does it do?

    Runs nothing and writes nothing but --json. The exit status is 0 if the step fits into the
    memory of the devices, else 2.
    """

    gpu: Gpu | None = None
    """The GPUs: 16 GB for v100, 80 GB for a100, unless the name says another size."""
    tpu: str | None = None
    """A topology of TPUs that libtpu knows, such as v5e:2x2."""
    hosts: Count | None = None
    """Hosts that share the GPUs of the mesh evenly; if left out, one for each 8."""
    json: Path | None = None
    """A file for the figures."""


@dataclass(frozen=True)
class FilePlanFlags:
    """Plans slices from a file of measured latencies, in about a second and without a device.

    Writes plan.json and plan.png into the workdir.
    """

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
    num_layers: Count | None = None
    """Layers of the model; if left out, interleaved is planned only when schedule names it."""
    chunks: Annotated[int, Range(2)] | None = None
    """As config.plan.chunks."""
    memory_limit_gib: NonNegative | None = None
    """Memory of a device that a step may use; needs a file that holds measured memory."""
    workdir: Path = Path("runs/plan")
    """Folder for plan.json and plan.png."""


@dataclass(frozen=True)
class CheckpointsFlags:
    """Lists the checkpoints of a run, and whether each is as it was written.

    Reads all of them and changes nothing, so it can be asked while the run goes on. The exit status
    is 1 if one is damaged.
    """

    workdir: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]
    """The run's folder."""


@dataclass(frozen=True)
class PlotFlags:
    """Draws the losses of a run, or of several runs in one picture."""

    workdirs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN ...")]]
    """Folders of runs."""
    out: Path | None = None
    """The picture; if left out, loss.png in the folder of the run, or here for several runs."""


@dataclass(frozen=True)
class MeshFlags:
    """The devices that share the work; data * pipe * model is their number."""

    data: Count = 1
    """Data-parallel shards of the batch."""
    pipe: Count = 1
    """Pipeline stages."""
    model: Count = 1
    """Devices that share each operator of a stage."""

    def config(self) -> MeshConfig:
        return MeshConfig(self.data, self.pipe, self.model)


@dataclass(frozen=True)
class ImportFlags:
    """Makes a workdir with the weights of a Hugging Face folder as its step 0: of GPT-2, Llama,
    Mistral, Qwen2, Qwen3, Mixtral or Qwen3-MoE.
    """

    source: Annotated[Path, tyro.conf.arg(name="from")]
    """The folder, with config.json and model.safetensors, in one file or several."""
    workdir: Path
    """A folder for a new run."""
    seq_len: Count | None = None
    """Tokens of a sequence; those that the folder names if left out. GPT-2's are fixed."""


@dataclass(frozen=True)
class ExportFlags:
    """Writes the weights of a run as a Hugging Face folder."""

    workdir: Path
    """The run's folder."""
    to: Path
    """A folder that does not exist yet."""
    step: CountOrZero | None = None
    """Step of the checkpoint; the newest if left out."""
    tokenizer: str | None = None
    """Tokenizer to write beside the weights: bytes or a tokenizer.json; config.data.tokenizer of
    the run if left out."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Format of the weights; that of the folder that the run was imported from if left out, else
    float32."""


@dataclass(frozen=True)
class GenerateFlags:
    """Continues a text with the model of a run.

    It stops where the model ends the document. A text that grows beyond the model's seq_len is
    continued from its second half.
    """

    workdir: Path
    """The run's folder."""
    prompt: str | None = None
    """The text."""
    tokenizer: str | None = None
    """Tokenizer of the text: bytes or a tokenizer.json; config.data.tokenizer of the run if left
    out."""
    prompt_ids: str | None = None
    """Token ids to continue instead of a text, as 464,3290."""
    prompt_file: Path | None = None
    """A file whose text is continued, as it is, in UTF-8."""
    max_tokens: Count = 200
    """Number of tokens to generate at most."""
    stop_at_end: bool = True
    """Whether to stop before the token that ends a document."""
    num_samples: Count = 1
    """Number of continuations, each drawn anew."""
    temperature: NonNegative = 0.7
    """Divides the logits before a token is drawn; 0 always takes the most likely token."""
    top_k: Count | None = None
    """Tokens are drawn from so many of the most likely ones; from all if left out."""
    top_p: Annotated[float, Range(0, high=1)] = 1.0
    """Tokens are drawn from the most likely ones that together have this probability."""
    seed: CountOrZero = 0
    """Seed of the draws."""
    step: CountOrZero | None = None
    """Step of the checkpoint; the newest if left out."""
    block: Annotated[str, tyro.conf.arg(name="config.model.block")] = BUILT_IN
    """A block of your own, FILE:CLASS, if the run has one: it is code, so it has to be named."""
    mesh: MeshFlags = MeshFlags()


@dataclass(frozen=True)
class EvaluateFlags:
    """Measures the loss of a run's model on a file or folder, or on what the run holds out."""

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
    block: Annotated[str, tyro.conf.arg(name="config.model.block")] = BUILT_IN
    """A block of your own, FILE:CLASS, if the run has one: it is code, so it has to be named."""
    mesh: MeshFlags = MeshFlags()


@dataclass(frozen=True)
class TokenizeFlags:
    """Turns text into token shards to train on, in parallel.

    If it is stopped, the same command goes on.
    A text file is a document, and so is each record of JSON lines or Parquet, in its field --field,
    and of ArrayRecord. Files may be compressed (.gz, .zst). Documents end with the tokenizer's own
    token for that, if it has one. Nothing is read from the network.
    """

    inputs: tyro.conf.Positional[tuple[Path, ...]]
    """Text files, files of records (JSON lines, Parquet, ArrayRecord), patterns, and folders."""
    out: Path
    """A folder that does not exist yet."""
    tokenizer: str = "bytes"
    """bytes, or the tokenizer.json of a Hugging Face model."""
    train_bpe: Count | None = None
    """First makes a tokenizer of this many tokens from the same text, as OUT.tokenizer.json."""
    num_workers: Count = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Processes that work at the same time."""
    text_separator: str | None = None
    """Text between the documents of a text file, as <|endoftext|>; each file is one if left out."""
    end_token: str | None = None
    """Token that ends a document; the tokenizer's own if left out."""
    on_empty: Literal["skip", "refuse"] = "skip"
    """What happens to empty files and documents. Those that are skipped are counted."""
    max_record_mib: MaxRecord = 32
    """Size of the largest record, in MiB; a larger one is refused."""
    field: str = "text"  # last, since it hides the function `field`
    """Field that holds the document in a record of JSON lines or Parquet."""
