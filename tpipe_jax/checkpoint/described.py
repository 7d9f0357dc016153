"""The model that a checkpoint describes, as far as its files bear it out. No jax.

A manifest may be a stranger's. A model that is larger than its arrays is refused before anything of
it is built.
"""

from collections import Counter

from tpipe_jax.checkpoint.manifest import DamagedError, Digests, Manifest
from tpipe_jax.config.settings import Config, ModelConfig
from tpipe_jax.errors import UserError, brief

PARAMS = "params"
ZARRAY = ".zarray"  # describes an array, beside its chunks
_FLOAT32 = 4  # bytes of a parameter


def model_of(manifest: Manifest) -> ModelConfig:
    """Returns the model of a checkpoint. Raises `DamagedError` if the manifest describes none, or
    one for which its files are too few or too small.
    """
    values = manifest.identity.get("model")
    try:
        if not isinstance(values, dict):
            raise TypeError("it has no settings of one")
        model = Config(model=ModelConfig(**values)).model  # raises if a value is wrong
    except (TypeError, UserError) as error:
        raise DamagedError(f"its manifest describes no model ({brief(error)})") from None
    _check_sizes(manifest.files, model)
    return model


def _check_sizes(files: Digests, model: ModelConfig) -> None:
    """Raises `DamagedError` if the files of an array hold less than the model's array has."""
    stored: Counter[str] = Counter()
    for name, (size, _) in files.items():
        folder, _, file = name.rpartition("/")
        stored[folder] += size if file != ZARRAY else 0
    blocks = f"{PARAMS}/blocks/"
    layers = {name.split("/")[2] for name in stored if name.startswith(blocks)}
    # First, since the loop below has a turn for each layer.
    if len(layers) != model.num_layers:
        raise DamagedError(f"it has {len(layers)} of config.model.num_layers={model.num_layers}")
    width = model.d_model
    table = model.vocab_size * width
    sizes = {f"{PARAMS}/embed/tokens": table}
    if model.family == "gpt2":
        sizes[f"{PARAMS}/embed/positions"] = model.seq_len * width
    if not model.has_tied_head:
        sizes[f"{PARAMS}/head/table"] = table
    if not model.has_own_block:
        heads = model.num_heads + 2 * model.num_key_heads
        num_hidden = model.ff_width * (2 if model.family == "llama" else 1)
        for layer in range(model.num_layers):
            sizes[f"{blocks}{layer}/attn_in/kernel"] = width * heads * model.width_of_heads
            of_experts = width * num_hidden * (model.num_experts or 1)
            name = "experts/ff_in" if model.num_experts else "ff_in/kernel"
            sizes[f"{blocks}{layer}/{name}"] = of_experts
    for name, size in sizes.items():
        if stored[name] < _FLOAT32 * size:
            raise DamagedError(
                f"{name} has {stored[name]} bytes, but its model has {_FLOAT32 * size}"
            )
