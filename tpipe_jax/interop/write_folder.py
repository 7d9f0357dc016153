"""Writes a Hugging Face folder of a model of any family (`hugging_face`)."""

import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tpipe_jax.config.settings import ModelConfig
from tpipe_jax.interop.hugging_face import (
    FORMATS,
    GENERATION,
    INDEX,
    SETTINGS,
    WEIGHTS,
    Adapter,
    Source,
    Weight,
    read_end,
    write_json,
)

SHARD_BYTES = 2 * 10**9  # of one file at most, unless a single weight is larger


def write_model(
    folder: Path,
    adapter: Adapter,
    model: ModelConfig,
    read: Callable[[str], np.ndarray],
    source: Source | None = None,
    dtype: str | None = None,
    end: int | None = None,
) -> None:
    """Writes a model into a folder, which must exist and be empty. `read` returns a parameter by
    its name here. `source` is what the folder said that the model comes from. Weights have the
    format `dtype`, or that of the source, or float32. `end` is the token that ends a document,
    after which the next one begins.

    At most `SHARD_BYTES` of weights are in memory at a time, or one weight if that is larger.
    """
    given = source.dtypes if source is not None and dtype is None else {}
    default = np.dtype(FORMATS[dtype or "float32"][1])
    numpy_of = {name: np.dtype(made) for name, made in FORMATS.values()}
    dtypes = {
        there: numpy_of.get(given.get(there, ""), default)
        for weight in adapter.all_weights(model)
        for there in weight.there
    }
    shards, sizes = _shards(adapter.all_weights(model), dtypes)
    names = [WEIGHTS]
    if len(shards) > 1:
        stem = WEIGHTS.removesuffix(".safetensors")
        total = len(shards)
        names = [f"{stem}-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)]
    places = {}
    for name, shard in zip(names, shards, strict=True):
        tensors = {}
        for weight in shard:
            values = weight.to_there(read(weight.name))
            for there, value in zip(weight.there, values, strict=True):
                full = adapter.full_name(there)
                tensors[full] = np.ascontiguousarray(value.astype(dtypes[there], copy=False))
                places[full] = name
        _save(tensors, folder / name)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": places})
    _write_settings(folder, adapter, model, source, dtypes, end)


def _shards(
    weights: Sequence[Weight], dtypes: Mapping[str, np.dtype]
) -> tuple[list[list[Weight]], list[int]]:
    """Returns the weights of each file, and the bytes of each file."""
    shards: list[list[Weight]] = [[]]
    sizes = [0]
    for weight in weights:
        size = sum(int(np.prod(s)) * dtypes[name].itemsize for name, s in weight.there.items())
        if shards[-1] and sizes[-1] + size > SHARD_BYTES:
            shards.append([])
            sizes.append(0)
        shards[-1].append(weight)
        sizes[-1] += size
    return shards, sizes


def _write_settings(
    folder: Path,
    adapter: Adapter,
    model: ModelConfig,
    source: Source | None,
    dtypes: Mapping[str, np.dtype],
    end: int | None,
) -> None:
    before = {} if source is None else source.settings
    settings = adapter.settings_of(model, before)
    is_own = before.get("model_type") == settings["model_type"]
    if is_own:  # what is not known here stays as it was
        settings = {**before, **settings}
        settings.pop("torch_dtype", None)
    most = max(set(dtypes.values()), key=list(dtypes.values()).count)
    settings["dtype"] = next(name for name, (_, made) in FORMATS.items() if np.dtype(made) == most)
    settings["architectures"] = [adapter.kinds[settings["model_type"]]]
    settings["tie_word_embeddings"] = model.has_tied_head
    if end is not None and read_end(settings, model.vocab_size) != end:
        settings |= {"eos_token_id": end}
    if not is_own:
        settings |= dict.fromkeys(("bos_token_id", "eos_token_id"), end)
    elif adapter.family == "gpt2" and settings.get("bos_token_id") is None:
        settings |= {"bos_token_id": end}
    write_json(folder / SETTINGS, settings)
    if source is not None and source.generation is not None:
        write_json(folder / GENERATION, source.generation)


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    """Writes a file of tensors with the permissions of a usual one: the library's are for its owner
    alone.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(stat.S_IMODE(mode))
