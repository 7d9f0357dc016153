"""All settings of a run as frozen dataclasses: each field has a default, a meaning and a range.

Rules that join several settings (slices that sum to the sequence, a mesh that fits the devices)
live in `planning.settings` and `devices.mesh`.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_type_hints

import tyro

from tpipe_jax.config.fields import (
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    Range,
    check_field,
)
from tpipe_jax.config.model_settings import BUILT_IN as BUILT_IN
from tpipe_jax.config.model_settings import ROPE_THETA as ROPE_THETA
from tpipe_jax.config.model_settings import (
    ModelConfig,
    check_model_settings,
    resolved_model,
    unresolved_model,
)
from tpipe_jax.errors import UserError, shown

BYTES, BYTES_NAME = 256, "bytes"  # of text read as bytes: vocabulary and tokenizer
IGNORE = -1  # a target that the loss leaves out
MAX_LOCAL = 2**28  # of the table of local positions, which takes eight bytes for each: 2 GiB


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are divided; data * pipe * model is the number of devices."""

    data: Count = 1
    """Data-parallel shards of the batch."""
    pipe: Count = 1
    """Pipeline stages."""
    model: Count = 1
    """Devices that share each operator of a stage (operator partitioning)."""
    order: str = "pipe,data,model"
    """The three axes, from the first to go across hosts to the one that stays inside a host."""
    auto: bool = False
    """Whether to search for the division with the fastest plan, as config.mesh=auto asks: of
    data * pipe * model devices, or of all GPUs or TPUs. Each division is profiled first."""

    @property
    def num_devices(self) -> int:
        return self.data * self.pipe * self.model


ScheduleName = Literal["terapipe", "1f1b", "interleaved", "1f1b-deferred"]


@dataclass(frozen=True)
class PlanConfig:
    """How batch and sequence are cut into the pieces that flow through the pipeline."""

    token_slices: str = "auto"
    """Token slices of each sequence: auto, uniform:N, or lengths that sum to seq_len, as
    96,64,56,40."""
    batch_slices: str = "auto"
    """Batch slices of each data shard: auto, uniform:N, or sizes that sum to its batch, which is
    batch_size / mesh.data, as 2,1,1."""
    unit_tokens: Count | None = None
    """Planned slices are multiples of this many tokens; None means about 8, and more in long
    sequences."""
    schedule: Literal["auto", ScheduleName] = "auto"
    """Order of the slices. terapipe: all forward, then all backward. interleaved: the same through
    several chunks of layers of each stage, so stages wait less. 1f1b: a batch slice (microbatch)
    goes backward while the next ones go forward, so few are stored. 1f1b-deferred: as 1f1b, with
    gradients of weights computed when a stage would wait. auto: the fastest that fits."""
    chunks: Annotated[int, Range(2)] | None = None
    """Chunks of layers of each stage under interleaved; None means the faster of 2 and 4, and 2
    where all slices are given."""
    file: str | None = None
    """A plan.json to train with instead, as tpipe plan writes it."""

    @property
    def num_chunks(self) -> int:
        """Chunks of each stage under the named schedule."""
        return (self.chunks or 2) if self.schedule == "interleaved" else 1


BALANCE = 0.001  # usual weight of the balance loss, as in Mixtral and Qwen3-MoE


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    num_steps: Count = 1000
    """Optimiser steps of the whole run."""
    batch_size: Count = 8
    """Sequences of a step, over all data shards."""
    seed: CountOrZero = 0
    """Seed of the initial parameters and of the order of the data."""
    init: Literal["normal", "local"] = "normal"
    """How fresh parameters are drawn. normal: as the block draws them, GPT-2's as published. local:
    so that tokens first attend to their neighbours; small models of long sequences learn sooner."""
    log_every: Count = 10
    """Steps between two lines in metrics.jsonl."""
    eval_every: Count = 100
    """Steps between two evaluations on held-out data."""
    eval_batches: Count = 8
    """Batches of an evaluation; they are always the same and stay on the devices."""
    sample_tokens: CountOrZero = 200
    """Tokens that the trained model adds to a held-out text at the end of the run."""
    compare_steps: CountOrZero = 0
    """Steps that are timed at the end of the run, in token slices and with whole sequences, to
    compare the two; 0 for none."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What happens when the loss or gradients are not finite: stop ends the run, skip goes on with
    the next step. Such a step changes nothing."""
    max_consecutive_skips: Count = 10
    """Steps in a row that skip may skip; one more ends the run."""
    step_timeout_seconds: Count = 1800
    """Longest time of a step, a batch of an evaluation or a save, in seconds. Beyond it the run
    ends in all processes, and says where it hangs."""
    trace_step: CountOrZero = 0
    """A step whose measured ticks are added to timeline.png and timeline.json, or the last one if
    there are fewer; 0 for none. One stage has none to show."""
    balance_weight: NonNegative | None = None
    """Weight of the balance loss, which keeps tokens from choosing the same experts; 0 for none.
    None means 0.001 where there are experts, and 0 for a block of your own."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up, cosine decay to a tenth, and clipping by the global norm."""

    learning_rate: NonNegative = 1e-3
    """Peak learning rate."""
    warmup_steps: CountOrZero = 50
    """Steps of linear warm-up."""
    weight_decay: NonNegative = 0.1
    """Decay of weight matrices; norms, biases and embeddings have none."""
    beta1: Fraction = 0.9
    """Decay rate of the first moment."""
    beta2: Fraction = 0.95
    """Decay rate of the second moment."""
    grad_clip: NonNegative = 1.0
    """Largest global norm of the gradients; 0 turns clipping off."""
    shard_state: bool | None = None
    """Whether data shards divide the optimiser state among themselves (ZeRO stage 1), instead of
    each holding all of it; None means yes where mesh.data > 1."""


MaxRecord = Annotated[float, Range(0.001, high=256)]


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from. Text: pydocs (the documentation inside Python), a text file, a
    .jsonl, .parquet or .array_record file of records, or a folder of such files. Tokens: a folder
    of tpipe tokenize, a .npy file, or a .bin file. A .bin file is llm.c's, Megatron-LM's with its
    .idx, or raw uint16 or uint32. Raw files are uint32 where vocab_size is over 65536, or where
    every other uint16 is 0. Several sources are mixed by weights, as a.bin:0.7,b.bin:0.3.
    """

    train: str = "pydocs"
    """Training tokens."""
    eval: str | None = None
    """Held-out tokens; None, or the same as train, means the last part of train."""
    tokenizer: str = BYTES_NAME
    """How text is read: as bytes, or by a tokenizer.json of Hugging Face."""
    held_out: Annotated[float, Range(0, high=0.5)] = 0.1
    """Fraction of train that is held out where eval has no source of its own."""
    field: str = "text"
    """Field of a record that holds its text. A record without this field has prompt and completion
    instead, and only the completion is learnt."""
    packing: Literal["auto", "cut", "whole"] = "auto"
    """How documents become sequences: cut joins them and cuts wherever a sequence ends; whole puts
    as many whole documents into a sequence as fit; auto means whole where there are prompts, else
    cut."""
    cross_document_attention: bool = True
    """Whether tokens see earlier documents of their sequence; if not, positions restart in each
    document."""
    separator: CountOrZero | None = None
    """The token between documents, in token files that don't say where documents begin."""
    end_token: str | None = None
    """The token of the tokenizer that ends a document; None means its own, as <|endoftext|> or
    </s>."""
    text_separator: str | None = None
    """Text between the documents of a text file, as <|endoftext|>; None means that each file is a
    document."""
    on_empty: Literal["skip", "refuse"] = "skip"
    """What happens to empty files and documents. Those that are skipped are counted."""
    long_prompts: Literal["refuse", "skip", "truncate"] = "refuse"
    """What happens to a record whose prompt and completion are longer than a sequence; truncate
    keeps its beginning."""
    max_record_mib: MaxRecord = 32
    """Size of the largest record, in MiB; a larger one is refused. Pages of Parquet that are read
    together may have four times as much."""

    @property
    def marks_documents(self) -> bool:
        """Whether rows say which document each token belongs to, and which tokens are learnt."""
        return self.packing == "whole" or not self.cross_document_attention


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints in the workdir; the last step and an interruption are saved too."""

    every: Count = 500
    """Steps between two checkpoints."""
    keep: Count = 2
    """Newest checkpoints that are kept."""
    async_: Annotated[bool, tyro.conf.arg(name="async")] = True
    """Whether training goes on while a checkpoint is written."""


@dataclass(frozen=True)
class MemoryConfig:
    """The memory of a device."""

    limit_gib: Annotated[float, Range(0)] | None = None
    """Memory that a step may use; None means the memory that the device reports; for a CPU, its
    share of the machine's memory."""
    remat: str = "auto"
    """What the backward pass computes again: none, dots (all but matrix products), full (all but
    layer inputs, keys and values), or names of what is saved instead, as attn,hidden; auto means
    the fastest that fits."""
    defer_weight_grads: bool = False
    """Whether gradients of weights are computed as one product for each layer after the last slice,
    rather than one for each slice: this shortens the ticks of deep pipelines and takes memory."""
    offload: bool = False
    """Whether saved values wait in the host's memory between the forward and the backward pass;
    attention caches stay on the device. For GPUs."""


# FlashAttention, for CUDA 12 and 13.
FLASH_PACKAGES = ("dew-flash-attn-cu12", "dew-flash-attn-cu13")
Backend = Literal["auto", "xla", "cudnn", "flash", "tokamax"]


@dataclass(frozen=True)
class AttentionConfig:
    """How attention is computed; the results are the same up to rounding."""

    backend: Backend = "auto"
    """xla runs everywhere; flash and cudnn run on GPUs from Ampere on, in float16 and bfloat16, and
    flash needs an extra, flash12 or flash13. auto means the first of flash, cudnn and xla that can
    run."""
    block: Count | None = None
    """Tokens of the context that are read together by xla and cudnn; None means 8192 for cudnn,
    128 for xla on CPUs, else 1024, and for xla on GPUs whole sequences of up to 4096 tokens."""


Scale = Annotated[float, Range(2**-24, high=2**64)]


Format = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class PrecisionConfig:
    """Number formats; parameters, sums of gradients, norms, softmax and loss are float32 always."""

    compute: Format = "auto"
    """Format of matrix products and activations; auto means float32 on CPUs, float16 on GPUs before
    Ampere (as V100), else bfloat16."""
    loss_scale_start: Scale = 2.0**16
    """Scale that the loss is multiplied by at first, in float16."""
    loss_scale_interval: Count = 1000
    """Steps without overflow after which the scale grows."""
    loss_scale_factor: Annotated[float, Range(1, high=2**10)] = 2.0
    """Factor by which the scale grows, and by which it shrinks at an overflow."""
    loss_scale_min: Scale = 1.0
    """Smallest loss scale; an overflow at this scale ends the run."""
    loss_scale_max: Scale = 2.0**24
    """Largest loss scale."""


@dataclass(frozen=True)
class MetricsConfig:
    """The numbers of a run, beside metrics.jsonl and TensorBoard's files."""

    wandb: str | None = None
    """Weights & Biases project that gets the numbers too; needs pip install tpipe_jax[wandb]."""
    peak_tflops: Annotated[float, Range(0)] | None = None
    """Peak speed of a device in TFLOP/s, for the share of it that is used (MFU); None means the
    maker's figure for a known GPU or TPU, in float16 and bfloat16."""
    stage_times_every: CountOrZero = 0
    """Steps between two in which each stage is timed, to name one that is slower than the others
    for long; 0 for none. Such a step is traced, which takes a moment. It needs two stages."""
    port: Annotated[int, Range(1, high=65535)] | None = None
    """Port at which process 0 answers Prometheus; needs pip install tpipe_jax[prometheus]."""


@dataclass(frozen=True)
class Config:
    """All settings of a run. Raises `UserError` if a field has a wrong type or is out of range."""

    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    plan: PlanConfig = field(default_factory=PlanConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        for path, hint, value in _fields(self):
            check_field(path, hint, value)
        check_model_settings(self.model)
        if self.train.balance_weight and not self.model.num_experts:
            raise UserError(
                f"config.train.balance_weight={self.train.balance_weight:g} is for mixtures of "
                "experts: leave it out, or set config.model.num_experts."
            )
        scale = self.precision
        if not scale.loss_scale_min <= scale.loss_scale_start <= scale.loss_scale_max:
            raise UserError(
                f"config.precision.loss_scale_start={scale.loss_scale_start:g} must be between "
                f"loss_scale_min={scale.loss_scale_min:g} and "
                f"loss_scale_max={scale.loss_scale_max:g}: set the three in that order."
            )
        if self.train.init == "local" and self.model.seq_len * self.model.d_model > MAX_LOCAL:
            raise UserError(
                f"config.train.init=local makes a table of config.model.seq_len="
                f"{self.model.seq_len} x config.model.d_model={self.model.d_model} numbers on each "
                f"host, and at most {MAX_LOCAL} are allowed: set config.train.init=normal."
            )
        if sorted(self.mesh.order.split(",")) != ["data", "model", "pipe"]:
            raise UserError(
                f"config.mesh.order={shown(self.mesh.order)} is no order of the three axes: give "
                f"one such as {MeshConfig.order}."
            )

    @property
    def balance_weight(self) -> float:
        """Weight of the balance loss; 0 if there is none."""
        usual = 0.0 if self.model.has_own_block else BALANCE
        given = self.train.balance_weight
        return (usual if given is None else given) if self.model.num_experts else 0.0


def resolved(config: Config) -> Config:
    """Returns the config with each default filled in that depends on other settings."""
    optim, shard_state = config.optim, config.optim.shard_state
    if shard_state is None:
        optim = dataclasses.replace(optim, shard_state=config.mesh.data > 1)
    return dataclasses.replace(config, model=resolved_model(config.model), optim=optim)


def unresolved(config: Config) -> Config:
    """Returns the config with None again where a field is what `resolved` would make of None.

    So settings that follow from others still follow them when these are changed.
    """
    optim = config.optim
    if optim.shard_state == (config.mesh.data > 1):
        optim = dataclasses.replace(optim, shard_state=None)
    return dataclasses.replace(config, model=unresolved_model(config.model), optim=optim)


def to_dict(config: Config) -> dict[str, Any]:
    """The resolved config as nested dictionaries, for `config.json`."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, dict[str, Any]]) -> Config:
    """The inverse of `to_dict`. Raises `UserError` if a section or field does not exist."""
    sections = get_type_hints(Config)
    try:
        return Config(**{name: sections[name](**section) for name, section in values.items()})
    except (KeyError, TypeError) as error:
        raise UserError(f"this is not the config of a run: {shown(error)}.") from None


def differences(ours: Any, theirs: Any, name: str = "config") -> Iterator[tuple[str, Any, Any]]:
    """Yields name, our value and their value for each difference between two values, which may be
    nested dictionaries. A value that one side lacks is None.
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in {**theirs, **ours}:
            yield from differences(ours.get(key), theirs.get(key), f"{name}.{key}" if name else key)
    elif ours != theirs:
        yield name, ours, theirs


def _fields(config: Config) -> Iterator[tuple[str, Any, Any]]:
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        for name, hint in get_type_hints(type(values), include_extras=True).items():
            yield f"config.{section.name}.{name}", hint, getattr(values, name)
