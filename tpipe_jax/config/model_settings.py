"""The settings of the model, `config.model`, and the rules that join them."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from tpipe_jax.config.fields import Count, Positive
from tpipe_jax.errors import UserError

Family = Literal["gpt2", "llama"]
BUILT_IN = "family"  # config.model.block that is the block of the family
ROPE_THETA = 10000.0
# Settings of models that gpt2 has not.
LLAMA_ONLY = (
    *("num_kv_heads", "head_width", "rope_theta", "rope_scaling"),
    *("qkv_bias", "qk_norm", "sliding_window", "num_experts"),
)
EXPERTS_OF_TOKEN = 2


@dataclass(frozen=True)
class ModelConfig:
    """The model: a GPT as published for GPT-2 and GPT-3, or one like Llama, Qwen or Mistral."""

    num_layers: Count = 4
    """Transformer blocks, spread over the stages as evenly as possible."""
    d_model: Count = 128
    """Width of the residual stream."""
    num_heads: Count = 4
    """Attention heads; must divide d_model unless head_width is given."""
    d_ff: Count | None = None
    """Width of the feed-forward layer, or of each expert; None means 4 * d_model, and for llama
    8/3 * d_model, rounded up to a multiple of 64."""
    vocab_size: Count = 256
    """Number of token ids; 256 reads text as bytes."""
    seq_len: Count = 256
    """Tokens of a training sequence."""
    family: Family = "gpt2"
    """The architecture. gpt2: learned positions, LayerNorm, GELU, biases, a head tied to the
    embedding. llama: rotary positions, RMSNorm, SwiGLU, grouped queries, no biases."""
    block: str = BUILT_IN
    """What each layer is: family, the block of the family, or a class of your own derived from
    tpipe_jax.Block, by its file and name, as my_block.py:MyBlock."""
    norm_eps: Positive = 1e-5
    """Added to the variance in each norm."""
    tied_head: bool | None = None
    """Whether the head is the embedding of tokens; None means yes for gpt2, no for llama."""
    num_kv_heads: Count | None = None
    """Heads of keys and values, each for several neighbouring heads of queries; None means
    num_heads. llama only, like the settings below."""
    head_width: Count | None = None
    """Width of each head, an even number; None means d_model / num_heads."""
    rope_theta: Positive | None = None
    """Base of the wavelengths of rotary positions; None means 10000."""
    rope_scaling: str | None = None
    """How rotary positions are stretched for contexts longer than those that the model was first
    trained on: linear:FACTOR, llama3:FACTOR,LOW,HIGH,ORIGINAL or
    yarn:FACTOR,ORIGINAL[,BETA_FAST,BETA_SLOW[,ATTENTION]]."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases, as in Qwen2."""
    qk_norm: bool = False
    """Whether each head of queries and keys is normed, as in Qwen3."""
    sliding_window: Count | None = None
    """Tokens that a token sees, itself included, as in Mistral; None means all before it."""
    num_experts: Count | None = None
    """Feed-forward layers in each block, of which a token goes through a few, as in Mixtral; None
    means one, for all tokens."""
    experts_per_token: Count | None = None
    """Experts that each token goes through; None means 2. Only with num_experts."""
    norm_topk_prob: bool = True
    """Whether the weights of a token's experts add up to 1. If not, a weight is the expert's
    probability among all experts. Only with num_experts."""

    def __post_init__(self) -> None:
        if self.family == "gpt2" and self.block == "gpt2":  # as runs before families name it
            object.__setattr__(self, "block", BUILT_IN)

    @property
    def has_own_block(self) -> bool:
        """Whether the layers are a class of the user's own."""
        return self.block != BUILT_IN

    @property
    def ff_width(self) -> int:
        if self.family == "llama":
            return self.d_ff or -(-8 * self.d_model // (3 * 64)) * 64
        return self.d_ff or 4 * self.d_model

    @property
    def has_tied_head(self) -> bool:
        return self.family == "gpt2" if self.tied_head is None else self.tied_head

    @property
    def window(self) -> int | None:
        """The sliding window; None where it is as long as the sequence."""
        is_shorter = self.sliding_window is not None and self.sliding_window < self.seq_len
        return self.sliding_window if is_shorter else None

    @property
    def experts_of_token(self) -> int:
        return self.experts_per_token or EXPERTS_OF_TOKEN

    @property
    def theta(self) -> float:
        return self.rope_theta or ROPE_THETA

    @property
    def num_key_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def width_of_heads(self) -> int:
        return self.head_width or self.d_model // self.num_heads


def check_model_settings(model: ModelConfig) -> None:
    """Raises `UserError` if settings of the model contradict each other."""
    if model.family == "gpt2":
        for name in LLAMA_ONLY:
            if value := getattr(model, name):
                raise UserError(
                    f"config.model.{name}={value} is nothing that gpt2 has: leave it out, or set "
                    "config.model.family=llama."
                )
    if not model.num_experts:
        for name, usual in {"experts_per_token": None, "norm_topk_prob": True}.items():
            if (value := getattr(model, name)) != usual:
                raise UserError(
                    f"config.model.{name}={value} is for mixtures of experts: leave it out, or set "
                    "config.model.num_experts."
                )
    elif model.experts_of_token > model.num_experts:
        raise UserError(
            f"config.model.experts_per_token={model.experts_of_token} is more than "
            f"config.model.num_experts={model.num_experts}: lower it."
        )
    if model.head_width is None and model.d_model % model.num_heads:
        raise UserError(
            f"config.model.num_heads={model.num_heads} does not divide "
            f"config.model.d_model={model.d_model}: pick a divisor."
        )
    if model.num_heads % model.num_key_heads:
        raise UserError(
            f"config.model.num_kv_heads={model.num_kv_heads} does not divide "
            f"config.model.num_heads={model.num_heads}: pick a divisor."
        )
    if model.family == "llama" and model.width_of_heads % 2:
        raise UserError(
            f"config.model.head_width={model.width_of_heads} is odd, but rotary positions turn "
            "pairs of numbers: pick an even one."
        )


def resolved_model(model: ModelConfig) -> ModelConfig:
    """Returns the model with each default filled in that depends on other settings."""
    model = dataclasses.replace(model, d_ff=model.ff_width, tied_head=model.has_tied_head)
    if model.family == "gpt2":
        return model
    return dataclasses.replace(
        model,
        num_kv_heads=model.num_key_heads,
        head_width=model.width_of_heads,
        rope_theta=model.theta,
        experts_per_token=model.experts_of_token if model.num_experts else None,
    )


def unresolved_model(model: ModelConfig) -> ModelConfig:
    """Returns the model with None for each setting that `resolved_model` would make the same of."""
    names = ("d_ff", "tied_head", "num_kv_heads", "head_width", "rope_theta", "experts_per_token")
    nothing: dict[str, Any] = dict.fromkeys(names)
    bare = dataclasses.replace(model, **nothing)
    filled = resolved_model(bare)
    given = {n: getattr(model, n) for n in names if getattr(model, n) != getattr(filled, n)}
    return dataclasses.replace(bare, **given)
