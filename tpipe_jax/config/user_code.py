"""Python files of the user: configs and blocks. No jax."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def load_file(path: Path) -> ModuleType:
    """Runs a file that ends in .py as a module of its own. Raises any error of the file's code."""
    name = f"tpipe_jax_user.{path.resolve().as_posix()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # for dataclasses
    spec.loader.exec_module(module)
    return module
