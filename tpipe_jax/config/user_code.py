"""Python files of the user: configs and blocks. No jax."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from tpipe_jax.config.paths import expanded
from tpipe_jax.config.settings import ModelConfig


def block_digest(model: ModelConfig) -> str | None:
    """Returns the SHA-256 digest of the file of a user's own block; None for a family's block.
    Raises OSError if the file cannot be read.
    """
    if not model.has_own_block:
        return None
    return hashlib.sha256(file_and_class(model.block)[0].read_bytes()).hexdigest()


def file_and_class(block: str) -> tuple[Path, str]:
    """Returns the file and the class that config.model.block names."""
    file, _, name = block.rpartition(":")
    return expanded("config.model.block", file), name


def load_file(path: Path) -> ModuleType:
    """Runs a file that ends in .py as a module of its own. Raises any error of the file's code."""
    name = f"tpipe_jax_user.{path.resolve().as_posix()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # for dataclasses
    spec.loader.exec_module(module)
    return module
