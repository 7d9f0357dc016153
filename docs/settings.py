"""Writes the tables of docs/settings.md: every setting with type, default, range and meaning.

    python docs/settings.py

All of it comes from the dataclasses in tpipe_jax/config/settings.py. A test fails if the page is
out of date. jax is not needed.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tpipe_jax.config import settings
from tpipe_jax.config.arguments import field_docs, spelled
from tpipe_jax.config.fields import parts_of

PAGE = Path(__file__).with_suffix(".md")
BEGIN = "<!-- Written by docs/settings.py: begin -->"
END = "<!-- Written by docs/settings.py: end -->"
TYPES = {int: "whole number", float: "number", bool: "true or false", str: "text"}


def described(hint: Any) -> tuple[str, str, str | None]:
    """The type of a field, the values that it may have, and its name on the command line if that
    differs.
    """
    bare, _, allowed = parts_of(hint)
    notes = getattr(hint, "__metadata__", ())
    name = next((note.name for note in notes if getattr(note, "name", None)), None)
    if get_origin(bare) is Literal:
        return "choice", ", ".join(f"`{value}`" for value in get_args(bare)), name
    return TYPES[bare], str(allowed or ""), name


def tables() -> str:
    """The generated part of the page: a table for each section."""
    parts = []
    for name, kind in get_type_hints(settings.Config).items():
        hints, said = get_type_hints(kind, include_extras=True), field_docs(kind)
        about = " ".join((kind.__doc__ or "").split())
        parts += [f"### config.{name}", "", about, ""]
        parts += ["| field | type | default | range | meaning |", "|---|---|---|---|---|"]
        for field in dataclasses.fields(kind):
            what, allowed, given = described(hints[field.name])
            cells = (
                f"`{name}.{given or field.name}`",
                what,
                f"`{spelled(field.default)}`",
                allowed,
                said[field.name].replace("*", r"\*").replace("|", r"\|"),
            )
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def renewed(page: str) -> str:
    """The page with the tables of today between the two marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text()))
