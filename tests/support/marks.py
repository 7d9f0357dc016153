"""Marks of single parameters."""

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A parameter set whose test is left out of the fast part."""
    return pytest.param(*values, marks=pytest.mark.slow)
