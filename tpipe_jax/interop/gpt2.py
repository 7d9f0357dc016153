"""GPT-2 in a Hugging Face folder: its settings, and its weights under their names there.

    config.json                     the settings
    model.safetensors               all weights, or
    model.safetensors.index.json    which file has which of them

Weights are `[in, out]` there as here. There the outputs of `c_attn` are all queries, then all keys,
then all values; here query, key and value of a head lie together (`model.gpt2`).
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tpipe_jax.config.settings import Config, ModelConfig
from tpipe_jax.errors import UserError, brief, shown
from tpipe_jax.json_files import read_json

SETTINGS, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
SHARD_BYTES = 2 * 10**9  # of one file at most, unless a single weight is larger

# Settings that are fixed in the model here, with the values that can be imported. If a folder
# leaves one out, the first value is meant.
FIXED: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
SIZES = {  # names there, and the size that is meant if a folder leaves one out
    "num_layers": ("n_layer", 12),
    "d_model": ("n_embd", 768),
    "num_heads": ("n_head", 12),
    "d_ff": ("n_inner", None),
    "vocab_size": ("vocab_size", 50257),
    "seq_len": ("n_positions", 1024),
}
BLOBS = "blobs"  # folder of Hugging Face's cache, which links in its folder `snapshots` lead to
WRITTEN = re.compile(  # names of files that `write_model` writes
    r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)
MASKS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # constant masks, in older files
PREFIX = "transformer."


class Weight(NamedTuple):
    """A parameter, with its name here and its name in the folder."""

    name: str
    """The name here, such as `blocks/3/ff_in/kernel`."""
    there: str
    """The name in the folder, such as `h.3.mlp.c_fc.weight`."""
    shape: tuple[int, ...]
    num_heads: int = 0
    """Heads by which the last axis is reordered; 0 if its order is the same."""

    def to_here(self, value: np.ndarray) -> np.ndarray:
        return self._swapped(value, (3, self.num_heads)) if self.num_heads else value

    def to_there(self, value: np.ndarray) -> np.ndarray:
        return self._swapped(value, (self.num_heads, 3)) if self.num_heads else value

    def _swapped(self, value: np.ndarray, order: tuple[int, int]) -> np.ndarray:
        return value.reshape(*value.shape[:-1], *order, -1).swapaxes(-3, -2).reshape(value.shape)


def weights_of(model: ModelConfig) -> list[Weight]:
    """Returns all parameters of the model."""
    V, T, H = model.vocab_size, model.seq_len, model.num_heads
    D, F = model.d_model, model.ff_width

    def norm(name: str, there: str) -> list[Weight]:
        parts = {"scale": "weight", "bias": "bias"}
        return [Weight(f"{name}/{a}", f"{there}.{b}", (D,)) for a, b in parts.items()]

    def linear(name: str, there: str, size: tuple[int, int], num_heads: int = 0) -> list[Weight]:
        return [
            Weight(f"{name}/kernel", f"{there}.weight", size, num_heads),
            Weight(f"{name}/bias", f"{there}.bias", size[1:], num_heads),
        ]

    weights = [
        Weight("embed/tokens", "wte.weight", (V, D)),
        Weight("embed/positions", "wpe.weight", (T, D)),
    ]
    for i in range(model.num_layers):
        here, there = f"blocks/{i}", f"h.{i}"
        weights += norm(f"{here}/norm_1", f"{there}.ln_1")
        weights += linear(f"{here}/attn_in", f"{there}.attn.c_attn", (D, 3 * D), H)
        weights += linear(f"{here}/attn_out", f"{there}.attn.c_proj", (D, D))
        weights += norm(f"{here}/norm_2", f"{there}.ln_2")
        weights += linear(f"{here}/ff_in", f"{there}.mlp.c_fc", (D, F))
        weights += linear(f"{here}/ff_out", f"{there}.mlp.c_proj", (F, D))
    return weights + norm("norm", "ln_f")


def is_written(name: str) -> bool:
    """Whether `write_model` writes files of this name."""
    return bool(WRITTEN.fullmatch(name))


def check_inside(folder: Path, path: Path) -> None:
    """Raises `UserError` if a file of a folder is a link that leads out of it; but a folder of
    Hugging Face's cache consists of links to the cache.
    """
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / BLOBS)
    if not any(target.is_relative_to(place) for place in allowed):
        raise UserError(
            f"--from={folder} has {shown(path.name)} as a link to {shown(target)}, out of that "
            "folder: put the file itself in its place."
        )


def read_model(folder: Path) -> ModelConfig:
    """Reads the settings of a folder's model. Raises `UserError` if the model here differs."""
    check_inside(folder, folder / SETTINGS)
    settings = _read_json(folder / SETTINGS)
    kind = settings.get("model_type")
    if kind != "gpt2":
        raise UserError(
            f"--from={folder} has a model of type {shown(kind)}: only gpt2 can be imported, "
            "GPT-2 and what has its architecture."
        )
    for name, allowed in FIXED.items():
        value = settings.get(name, allowed[0])
        if value not in allowed:
            raise UserError(
                f"--from={folder} has {name}={shown(value)} in {SETTINGS}, but the model here has "
                f"{allowed[0]} always: it would compute something else."
            )
    try:
        sizes = {name: settings.get(there, size) for name, (there, size) in SIZES.items()}
        return Config(model=ModelConfig(**sizes)).model  # raises if a value is wrong
    except UserError as error:
        raise UserError(
            f"--from={folder} has a {SETTINGS} that cannot be used: {brief(error)}"
        ) from None


def read_end(folder: Path, vocab_size: int) -> int | None:
    """Returns the token that ends a document for the folder's model; None if it has none."""
    given = _read_json(folder / SETTINGS).get("eos_token_id")
    ends = given if isinstance(given, list) else [given]
    known = [end for end in ends if type(end) is int and 0 <= end < vocab_size]
    return known[0] if known else None


class Reader:
    """Reads the weights of a folder, one at a time. Raises `UserError` if they don't fit the
    model.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self._folder = folder
        self._files = _files(folder)
        # First, since a list is made of all weights that the settings ask for.
        layers = {name.split(".")[1] for name in self._files if name.startswith("h.")}
        if len(layers) < model.num_layers:
            raise UserError(
                f"--from={folder} has weights of {len(layers)} layers, but {SETTINGS} asks for "
                f"{model.num_layers}: see that all files of the model are there."
            )
        self._weights = {weight.name: weight for weight in weights_of(model)}
        expected = {weight.there for weight in self._weights.values()}
        if missing := sorted(expected - self._files.keys()):
            raise UserError(
                f"--from={folder} has no weight {missing[0]}, nor {len(missing) - 1} others that "
                f"{SETTINGS} asks for: see that all files of the model are there."
            )
        others = {name for name in self._files.keys() - expected if not MASKS.fullmatch(name)}
        if foreign := sorted(others - {"lm_head.weight"}):
            raise UserError(
                f"--from={folder} has a weight {shown(foreign[0])}, which GPT-2 has not: only gpt2 "
                "can be imported."
            )
        for weight in self._weights.values():
            self._check(weight)
        self._check_head()

    def __call__(self, name: str) -> np.ndarray:
        """Returns a parameter by its name here, float32."""
        weight = self._weights[name]
        value = self._open(weight.there, lambda file, key: file.get_tensor(key))
        return np.ascontiguousarray(weight.to_here(value.astype(np.float32, copy=False)))

    def _check(self, weight: Weight) -> None:
        shape, dtype = self._open(
            weight.there,
            lambda file, key: (tuple(file.get_slice(key).get_shape()), _dtype(file, key)),
        )
        if shape != weight.shape or dtype not in ("F32", "F16", "BF16", "F64"):
            raise UserError(
                f"--from={self._folder} has {weight.there} as {dtype} {list(shape)}, but "
                f"{SETTINGS} asks for numbers of shape {list(weight.shape)}: see that they belong "
                "together."
            )

    def _check_head(self) -> None:
        """Raises `UserError` if the folder has a head that differs from the token embedding."""
        if "lm_head.weight" not in self._files:
            return
        head, table = (
            self._open(name, lambda file, key: file.get_tensor(key))
            for name in ("lm_head.weight", "wte.weight")
        )
        if not np.array_equal(head, table):
            raise UserError(
                f"--from={self._folder} has a head lm_head.weight of its own, but here the head is "
                "the token embedding wte.weight: it would compute something else."
            )

    def _open(self, name: str, use: Callable[[Any, str], Any]) -> Any:
        path, key = self._files[name]
        try:
            with safe_open(path, "numpy") as file:
                return use(file, key)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({brief(error)}): download it again.") from None


def write_model(
    folder: Path,
    model: ModelConfig,
    read: Callable[[str], np.ndarray],
    shard_bytes: int,
    end: int | None = None,
) -> None:
    """Writes a model into a folder, which must exist and be empty. `read` returns a parameter by
    its name here. `end` is the token that ends a document, after which the next one begins.

    At most `shard_bytes` of weights are in memory at a time, or one weight if that is larger.
    """
    shards: list[list[Weight]] = [[]]
    sizes = [0]
    for weight in weights_of(model):
        size = 4 * int(np.prod(weight.shape))
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(weight)
        sizes[-1] += size
    names = [WEIGHTS]
    if len(shards) > 1:
        stem = WEIGHTS.removesuffix(".safetensors")
        names = [
            f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
        ]
    for name, shard in zip(names, shards, strict=True):
        tensors = {
            PREFIX + weight.there: np.ascontiguousarray(weight.to_there(read(weight.name)))
            for weight in shard
        }
        _save(tensors, folder / name)
    if len(shards) > 1:
        places = {
            PREFIX + weight.there: name
            for name, shard in zip(names, shards, strict=True)
            for weight in shard
        }
        _write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": places})
    settings = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": "float32"}
    settings |= {there: getattr(model, name) for name, (there, _) in SIZES.items()}
    settings |= {name: allowed[0] for name, allowed in FIXED.items()}
    settings |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    settings |= dict.fromkeys(("bos_token_id", "eos_token_id"), end)
    _write_json(folder / SETTINGS, settings)


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a file of tensors with the permissions of a usual one: the library's are for its owner
    alone.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(stat.S_IMODE(mode))


def _files(folder: Path) -> dict[str, tuple[Path, str]]:
    """Returns the file of each weight and its name in that file, by its name without the prefix
    that models with a head have.
    """
    check_inside(folder, folder / INDEX)
    if (folder / INDEX).exists():
        places = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise UserError(f"{folder / INDEX} has no weight_map: download it again.")
        paths: Iterable[Path] = sorted({folder / str(name) for name in places.values()})
    else:
        paths = [folder / WEIGHTS]
    return {key.removeprefix(PREFIX): (path, key) for path in paths for key in _keys(folder, path)}


def _keys(folder: Path, path: Path) -> Iterator[str]:
    if path.parent != folder or not os.path.isfile(path):
        raise UserError(
            f"--from={folder} has no {shown(path.name)}: give a folder with {SETTINGS} and "
            f"{WEIGHTS}, or {INDEX} and the files that it names."
        )
    check_inside(folder, path)
    try:
        with safe_open(path, "numpy") as file:
            yield from file.keys()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({brief(error)}): download it again.") from None


def _dtype(file: Any, key: str) -> str:
    return file.get_slice(key).get_dtype()


def _read_json(path: Path) -> dict[str, Any]:
    reason = "it is no object"
    try:
        value = read_json(path)
        if isinstance(value, dict):
            return value
    except (OSError, ValueError) as error:
        reason = str(error)
    raise UserError(
        f"{path} cannot be read ({reason}): give a Hugging Face folder of a GPT-2 model."
    )


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
