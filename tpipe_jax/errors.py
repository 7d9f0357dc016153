"""Errors that the user can mend, each told in one sentence. No jax."""

import textwrap


class UserError(Exception):
    """An error that the user can mend: one sentence with setting, value, rule and remedy."""


class Infeasible(UserError):
    """These settings cannot work, and every process finds so on its own; a search over meshes may
    skip them and go on.
    """


def brief(error: Exception) -> str:
    """The message of an error in at most 160 characters."""
    return textwrap.shorten(str(error) or type(error).__name__, 160, placeholder=" ...")


def shown(value: object) -> str:
    """Returns a value of a file, which may be anything, as it can be printed within a sentence."""
    text = str(value) if str(value).isprintable() else ascii(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
