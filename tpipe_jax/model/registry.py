"""Finds the family that a config names, and its block: the family's, or a class of the user's."""

import inspect
from functools import cache

from tpipe_jax.config.settings import BUILT_IN, ModelConfig
from tpipe_jax.config.user_code import file_and_class, load_file
from tpipe_jax.errors import UserError
from tpipe_jax.model import gpt2, llama
from tpipe_jax.model.block import Block, Family

_FAMILIES: dict[str, Family] = {"gpt2": gpt2.FAMILY, "llama": llama.FAMILY}


def family(config: ModelConfig) -> Family:
    """Returns the architecture that config.model.family names."""
    return _FAMILIES[config.family]


def block_class(config: ModelConfig) -> type[Block]:
    """Returns the class that config.model.block names. Raises `UserError` if there is no such class
    derived from `Block`.
    """
    if not config.has_own_block:
        return family(config).block_of(config)
    return _load(config.block)


@cache
def _load(setting: str) -> type[Block]:
    path, name = file_and_class(setting)
    if not path.is_file() or path.suffix != ".py":
        raise UserError(
            f"config.model.block={setting} names no Python file: give {BUILT_IN}, or a file and a "
            "class, as my_block.py:MyBlock."
        )
    try:
        module = load_file(path)
    except Exception as error:  # whatever the file's code raises is for its author to mend
        raise UserError(
            f"config.model.block={setting} cannot be used ({type(error).__name__}: {error})."
        ) from error
    own = getattr(module, name, None)
    if not inspect.isclass(own) or not issubclass(own, Block):
        raise UserError(
            f"config.model.block={setting} is no class derived from tpipe_jax.Block: make it one."
        )
    return own
