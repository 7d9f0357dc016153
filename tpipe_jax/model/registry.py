"""Finds the block that a config names: GPT-2's, or a class in a file of the user."""

import inspect
from functools import cache

from tpipe_jax.config.settings import GPT2, ModelConfig
from tpipe_jax.config.user_code import file_and_class, load_file
from tpipe_jax.errors import UserError
from tpipe_jax.model.block import Block
from tpipe_jax.model.gpt2 import GPT2Block


def block_class(config: ModelConfig) -> type[Block]:
    """Returns the class that config.model.block names. Raises `UserError` if there is no such class
    derived from `Block`.
    """
    if config.block == GPT2:
        return GPT2Block
    return _load(config.block)


@cache
def _load(setting: str) -> type[Block]:
    path, name = file_and_class(setting)
    if not path.is_file() or path.suffix != ".py":
        raise UserError(
            f"config.model.block={setting} names no Python file: give {GPT2}, or a file and a "
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
