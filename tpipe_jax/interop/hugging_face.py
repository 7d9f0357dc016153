"""A Hugging Face folder of a model of any family: what is in it, and how it is read.

    config.json                     the settings
    model.safetensors               all weights, or
    model.safetensors.index.json    which file has which of them
    generation_config.json          how text is generated, if the folder has it
    tokenizer_config.json           how a tokenizer is used, if the folder has one

An `Adapter` for each family says what its settings mean, and which weights a model has there.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from tpipe_jax.config.settings import Config, ModelConfig
from tpipe_jax.errors import UserError, brief, shown
from tpipe_jax.json_files import read_json

SETTINGS, WEIGHTS = "config.json", "model.safetensors"
GENERATION, TOKENIZER = "generation_config.json", "tokenizer_config.json"
_CODE = ("auto_map", "custom_pipelines", "trust_remote_code")  # settings that name code
INDEX = f"{WEIGHTS}.index.json"
HEAD = "lm_head.weight"
BLOBS = "blobs"  # folder of Hugging Face's cache, which links in its folder `snapshots` lead to
FORMATS: dict[str, tuple[str, Any]] = {  # by their names in config.json: safetensors' and numpy's
    "float32": ("F32", np.float32),
    "bfloat16": ("BF16", jnp.bfloat16),
    "float16": ("F16", np.float16),
}
_READABLE = ("F32", "F16", "BF16", "F64")
_WRITTEN = re.compile(  # names of files that `write_model` writes
    r"(generation_)?config\.json|model(-\d{5}-of-\d{5})?\.safetensors"
    r"|model\.safetensors\.index\.json"
)

Shape = tuple[int, ...]
Settings = dict[str, Any]


class Weight(NamedTuple):
    """A parameter, and the weights of the folder that it is made of."""

    name: str
    """The name here, such as `blocks/3/ff_in/kernel`."""
    shape: Shape
    """The shape here."""
    there: Mapping[str, Shape]
    """Names in the folder without the prefix, such as `h.3.mlp.c_fc.weight`, and shapes there."""
    to_here: Callable[[Sequence[np.ndarray]], np.ndarray] = lambda values: values[0]
    to_there: Callable[[np.ndarray], Sequence[np.ndarray]] = lambda value: [value]


class Adapter(NamedTuple):
    """A family in Hugging Face folders."""

    family: str
    """config.model.family."""
    kinds: Mapping[str, str]
    """Values of `model_type` in config.json, with the name of the class that loads the model."""
    prefix: str
    """In front of the names of all weights but that of the head."""
    layer: str
    """In front of the number of a layer, in names without the prefix."""
    embedding: str
    """Name of the table of the tokens, without the prefix."""
    read_model: Callable[[Settings], ModelConfig]
    """Settings to the model. Raises `UserError`, whose text ends a sentence on the folder."""
    weights_of: Callable[[ModelConfig], list[Weight]]
    """All weights of a model but that of a head with a table of its own."""
    settings_of: Callable[[ModelConfig, Settings], Settings]
    """The settings of a model, given those of the folder that it comes from, or none."""
    constants: re.Pattern[str]
    """Names of what is left out, since it follows from the settings."""

    def all_weights(self, model: ModelConfig) -> list[Weight]:
        """Returns all weights of a model."""
        weights = self.weights_of(model)
        if not model.has_tied_head:
            shape = model.vocab_size, model.d_model
            weights.append(Weight("head/table", shape, {HEAD: shape}))
        return weights

    def full_name(self, there: str) -> str:
        """Returns the name of a weight in a folder that is written."""
        return there if there == HEAD else self.prefix + there


class Source(NamedTuple):
    """What a folder says beside its weights, kept to write a folder like it."""

    settings: Settings
    generation: Settings | None
    tokenizer: Settings | None
    """tokenizer_config.json."""
    dtypes: dict[str, str]
    """The format of each weight, as safetensors names it, by its name without the prefix."""


def is_written(name: str) -> bool:
    """Whether `write_model` writes files of this name."""
    return bool(_WRITTEN.fullmatch(name))


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


def read_settings(folder: Path, name: str = SETTINGS) -> Settings:
    """Returns the settings in a file of a folder. Raises `UserError` if it has none."""
    check_inside(folder, folder / name)
    return _read_json(folder / name)


def read_model(folder: Path, adapters: Sequence[Adapter]) -> tuple[Adapter, ModelConfig]:
    """Reads the settings of a folder's model. Raises `UserError` if no family here has it."""
    settings = read_settings(folder)
    kind = settings.get("model_type")
    adapter = next((a for a in adapters if isinstance(kind, str) and kind in a.kinds), None)
    if adapter is None:
        known = ", ".join(kind for a in adapters for kind in a.kinds)
        raise UserError(
            f"--from={folder} has a model of type {shown(kind)}: only {known} can be imported, and "
            "what has their architectures."
        )
    try:
        return adapter, Config(model=adapter.read_model(settings)).model  # raises if one is wrong
    except UserError as error:
        raise UserError(
            f"--from={folder} has a {SETTINGS} that cannot be used: {brief(error)}"
        ) from None


def read_source(folder: Path, reader: "Reader") -> Source:
    """Returns what a folder says beside its weights. What names code is left out."""

    def read(name: str) -> Settings | None:
        return read_settings(folder, name) if (folder / name).exists() else None

    source = Source(read(SETTINGS) or {}, read(GENERATION), read(TOKENIZER), reader.dtypes())
    return _without_code(source)


def _without_code(source: Source) -> Source:
    def kept(settings: Settings) -> Settings:
        return {key: value for key, value in settings.items() if key not in _CODE}

    generation, tokenizer = (
        None if settings is None else kept(settings)
        for settings in (source.generation, source.tokenizer)
    )
    return Source(kept(source.settings), generation, tokenizer, source.dtypes)


def write_source(path: Path, source: Source) -> None:
    """Writes a file for `load_source`. Raises OSError."""
    write_json(path, source._asdict())


def load_source(path: Path) -> Source | None:
    """Returns what `write_source` has written; None if there is no such file. Raises `UserError` if
    it is none.
    """
    if not path.exists():
        return None
    try:
        source = Source(**_read_json(path))
        tables = source.settings, source.generation or {}, source.tokenizer or {}, source.dtypes
        is_sound = all(isinstance(table, dict) for table in tables)
        if is_sound and all(isinstance(dtype, str) for dtype in source.dtypes.values()):
            return _without_code(source)
    except TypeError:
        pass
    raise UserError(
        f"{path} is not what an import has written: remove it, to export without the settings of "
        "the folder that the run was imported from."
    )


def read_end(settings: Settings, vocab_size: int) -> int | None:
    """Returns the token that ends a document for a folder's model; None if it has none."""
    given = settings.get("eos_token_id")
    ends = given if isinstance(given, list) else [given]
    known = [end for end in ends if type(end) is int and 0 <= end < vocab_size]
    return known[0] if known else None


def fixed(settings: Settings, values: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises `UserError` unless each of these settings has one of its values; the first is meant if
    the settings leave it out.
    """
    for name, allowed in values.items():
        value = settings.get(name, allowed[0])
        if not any(value == one and type(value) is type(one) for one in allowed):
            raise UserError(
                f"{name}={shown(value)}, but the model here has {allowed[0]} always, and would "
                "compute something else."
            )


class Reader:
    """Reads the weights of a folder, one parameter at a time. Raises `UserError` if they don't fit
    the model.
    """

    def __init__(self, folder: Path, adapter: Adapter, model: ModelConfig) -> None:
        self._folder, self._adapter = folder, adapter
        self._files = _files(folder, adapter.prefix)
        # First, since a list is made of all weights that the settings ask for.
        start = adapter.layer
        layers = {
            name.removeprefix(start).split(".")[0] for name in self._files if name.startswith(start)
        }
        if len(layers) < model.num_layers:
            raise UserError(
                f"--from={folder} has weights of {len(layers)} layers, but {SETTINGS} asks for "
                f"{model.num_layers}: see that all files of the model are there."
            )
        if len(self._files) < model.num_layers * (model.num_experts or 1):
            raise UserError(
                f"--from={folder} has {len(self._files)} weights, but {SETTINGS} asks for "
                f"{model.num_experts} experts in each layer: see that all files of the model are "
                "there."
            )
        self._weights = {weight.name: weight for weight in adapter.all_weights(model)}
        expected = {there for weight in self._weights.values() for there in weight.there}
        if missing := sorted(expected - self._files.keys()):
            raise UserError(
                f"--from={folder} has no weight {missing[0]}, nor {len(missing) - 1} others that "
                f"{SETTINGS} asks for: see that all files of the model are there."
            )
        others = {n for n in self._files.keys() - expected if not adapter.constants.fullmatch(n)}
        if model.has_tied_head:
            others.discard(HEAD)
        if foreign := sorted(others):
            raise UserError(
                f"--from={folder} has a weight {shown(foreign[0])}, which {SETTINGS} does not ask "
                "for: without it, the model would compute something else."
            )
        for weight in self._weights.values():
            for there, shape in weight.there.items():
                self._check(there, shape)
        if model.has_tied_head:
            self._check_head()

    def __call__(self, name: str) -> np.ndarray:
        """Returns a parameter by its name here, float32."""
        weight = self._weights[name]
        values = [
            self._open(there, lambda file, key: file.get_tensor(key)).astype(np.float32, copy=False)
            for there in weight.there
        ]
        return np.ascontiguousarray(weight.to_here(values))

    def dtypes(self) -> dict[str, str]:
        """The format of each weight, by its name without the prefix."""
        names = [there for weight in self._weights.values() for there in weight.there]
        return {name: self._open(name, _dtype) for name in names}

    def _check(self, name: str, expected: Shape) -> None:
        shape, dtype = self._open(
            name, lambda file, key: (tuple(file.get_slice(key).get_shape()), _dtype(file, key))
        )
        if shape != expected or dtype not in _READABLE:
            raise UserError(
                f"--from={self._folder} has {name} as {dtype} {list(shape)}, but "
                f"{SETTINGS} asks for numbers of shape {list(expected)}: see that they belong "
                "together."
            )

    def _check_head(self) -> None:
        """Raises `UserError` if the folder has a head that differs from the token embedding."""
        if HEAD not in self._files:
            return
        head, table = (
            self._open(name, lambda file, key: file.get_tensor(key))
            for name in (HEAD, self._adapter.embedding)
        )
        if not np.array_equal(head, table):
            raise UserError(
                f"--from={self._folder} has a head {HEAD} of its own, but {SETTINGS} says that it "
                f"is {self._adapter.embedding}: set tie_word_embeddings to false there."
            )

    def _open(self, name: str, use: Callable[[Any, str], Any]) -> Any:
        path, key = self._files[name]
        try:
            with safe_open(path, "numpy") as file:
                return use(file, key)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} cannot be read ({brief(error)}): download it again.") from None


def _files(folder: Path, prefix: str) -> dict[str, tuple[Path, str]]:
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
    return {key.removeprefix(prefix): (path, key) for path in paths for key in _keys(folder, path)}


def _keys(folder: Path, path: Path) -> Iterator[str]:
    is_plain = path.parent == folder and "\0" not in path.name
    if not is_plain or not path.is_file():
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


def _read_json(path: Path) -> Settings:
    reason = "it is no object"
    try:
        value = read_json(path)
        if isinstance(value, dict):
            return value
    except (OSError, ValueError) as error:
        reason = str(error)
    raise UserError(f"{path} cannot be read ({reason}): give a Hugging Face folder of a model.")


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file. Raises OSError."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
