"""Token-level pipeline parallelism (TeraPipe) for training large GPTs in JAX.

`Config`, `plan`, `make_train_step`, `train`, `load`, `import_model` and `Block` are the library;
`api` describes them. They are imported when they are first asked for, so that settings of jax and
XLA may come before.

The letters at the end of an array's name are its shape, here and in every module; inside
`shard_map` they mean the shape on this device.

    B  sequences                M  batch slices
    L  tokens of a slice        S  slices
    T  tokens of the sequence   P  stages
    C  context before a slice   N  layers on a stage, or heads of queries
    D  model width              H  heads, where they differ of keys
    F  feed-forward width       K  head width
    V  vocabulary               t  query, key or value
"""

import importlib
from typing import TYPE_CHECKING, Any

from tpipe_jax.version import __version__ as __version__

if TYPE_CHECKING:
    from tpipe_jax.api import Config, TrainStep, import_model, load, make_train_step, plan, train
    from tpipe_jax.model.block import Block

__all__ = [
    "Block",
    "Config",
    "TrainStep",
    "import_model",
    "load",
    "make_train_step",
    "plan",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "model.block" if name == "Block" else "api"
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
