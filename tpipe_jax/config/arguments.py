"""Reads a command line into a dataclass: values, help, and one sentence for each mistake. No jax.

tyro does the reading. Values, help texts and the style of errors are ours.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import os
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from tpipe_jax.config.fields import Range, check_field, parts_of
from tpipe_jax.config.habits import FORMATS, advice
from tpipe_jax.config.paths import NO_ADDRESS, is_address
from tpipe_jax.config.settings import Config
from tpipe_jax.errors import UserError

Kind = TypeVar("Kind")
_REGISTRY = ConstructorRegistry()
_WIDE = "10000"  # columns, so that tyro does not break its sentences


def read_flags(
    kind: type[Kind],
    args: Sequence[str],
    program: str,
    examples: Sequence[str] = (),
    default: Kind | None = None,
) -> Kind:
    """Returns the dataclass `kind` as the arguments say. Prints help and exits if asked to.

    The help starts with the docstring of `kind` and the examples. Raises `UserError` for a flag
    that does not exist, for a value that cannot be read, and for a value that is missing.
    """
    about = inspect.cleandoc(kind.__doc__ or "")
    if examples:
        about += "\n\nExamples:\n" + "\n".join(
            f"    {program} {words}".rstrip() for words in examples
        )

    def read() -> Kind:
        with _REGISTRY:
            return tyro.cli(
                kind,
                args=list(args),
                prog=program,
                description=about,
                default=tyro.MISSING if default is None else default,
                config=(tyro.conf.FlagConversionOff,),  # true or false has to be said
            )

    if {"-h", "--help"} & set(args):
        return read()
    _check_names(args, list(flag_names(kind)), program)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), _columns(_WIDE):
            flags = read()
    except SystemExit as exit_:
        if exit_.code != 2:
            raise
        raise UserError(f"{_sentence(told.getvalue())}; {program} --help tells more.") from None
    _check_ranges(flags)
    return flags


@contextlib.contextmanager
def _columns(number: str) -> Iterator[None]:
    """Lets the terminal seem to have so many columns."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = number
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _check_ranges(values: Any, prefix: str = "--") -> None:
    """Raises `UserError` for a value out of its range. A `Config` checks its own."""
    for name, hint in get_type_hints(type(values), include_extras=True).items():
        value, (bare, _, allowed) = getattr(values, name), parts_of(hint)
        flag = prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(bare) and bare is not Config:
            is_bare = tyro.conf.OmitArgPrefixes in getattr(hint, "__metadata__", ())
            _check_ranges(value, "--" if is_bare else f"{flag}.")
        elif allowed is not None:
            check_field(flag, hint, value)


def flag_names(kind: type, prefix: str = "--") -> Iterator[str]:
    """Yields the flags of a dataclass, as --config.model.num-layers."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        notes = getattr(hint, "__metadata__", ())
        bare, _, _ = parts_of(hint)
        given = [note.name for note in notes if getattr(note, "name", None)]
        flag = prefix + (given[0] if given else name.replace("_", "-"))
        if any(note is tyro.conf.Positional for note in notes):
            continue
        if dataclasses.is_dataclass(bare):
            is_bare = any(note is tyro.conf.OmitArgPrefixes for note in notes)
            assert isinstance(bare, type)
            yield from flag_names(bare, "--" if is_bare else f"{flag}.")
        else:
            yield flag


def field_docs(kind: type) -> dict[str, str]:
    """Returns the docstring below each field of a dataclass, on one line."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        [node] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for field, doc in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = doc.value if isinstance(doc, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    docs[field.target.id] = " ".join(text.value.split())
    return docs


@_REGISTRY.struct_rule
def _dataclass(info: StructTypeInfo) -> StructConstructorSpec | None:
    """Reads our dataclasses: each field with its docstring, its default and its range as help."""
    if not dataclasses.is_dataclass(info.type) or not info.type.__module__.startswith("tpipe_jax"):
        return None
    docs = field_docs(info.type)
    hints = get_type_hints(info.type, include_extras=True)
    fields = []
    for field in dataclasses.fields(info.type):
        default: Any = tyro.MISSING
        if dataclasses.is_dataclass(info.default):
            default = getattr(info.default, field.name)
        elif field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        hint = _with_reader(hints[field.name])
        bare = parts_of(hint)[0]
        about = bare.__doc__ if dataclasses.is_dataclass(bare) else docs.get(field.name)
        fields.append(StructFieldSpec(field.name, hint, default, inspect.cleandoc(about or "")))
    return StructConstructorSpec(info.type, tuple(fields))


def _with_reader(hint: Any) -> Any:
    """Returns a field's type with what reads it, unless tyro reads it as we want."""
    bare, is_optional, allowed = parts_of(hint)
    notes = tuple(n for n in getattr(hint, "__metadata__", ()) if not isinstance(n, Range))
    reader = _reader(bare)
    if reader is None:
        return hint
    read, metavar = reader

    def from_words(words: list[str]) -> Any:
        return None if is_optional and words[0].lower() == "none" else read(words[0])

    spec = PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=from_words,
        is_instance=lambda value: True,
        str_from_instance=lambda value: [spelled(value)],
    )
    name = next((note.name for note in notes if getattr(note, "name", None)), None)
    others = [note for note in notes if getattr(note, "name", None) is None]
    ranged = f"; {allowed}" if allowed else ""
    shown = tyro.conf.arg(
        name=name,
        help_behavior_hint=lambda default: f"(default: {default}{ranged})",
    )
    union = bare | None if is_optional else bare
    return functools.reduce(lambda a, note: Annotated[a, note], [*others, spec, shown], union)


def _reader(bare: Any) -> tuple[Callable[[str], Any], str] | None:
    if get_origin(bare) is Literal:
        choices = get_args(bare)
        return functools.partial(_choice, choices), "{" + ",".join(choices) + "}"
    return {
        bool: (_truth, "{true,false}"),
        int: (_whole_number, "INT"),
        float: (_number, "FLOAT"),
        str: (str, "TEXT"),
        Path: (_path, "PATH"),
    }.get(bare)


def spelled(value: Any) -> str:
    """Returns a value as one would write it on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Path):
        return os.fspath(value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _path(word: str) -> Path:
    if is_address(word):
        raise ValueError(f"={word} {NO_ADDRESS}")
    return Path(os.path.expanduser(word))


def _truth(word: str) -> bool:
    try:
        return {"true": True, "false": False}[word.lower()]
    except KeyError:
        raise ValueError(f"={word} must be true or false") from None


def _whole_number(word: str) -> int:
    with contextlib.suppress(ValueError):
        return int(word)
    with contextlib.suppress(ValueError, OverflowError):
        if float(word) == int(float(word)):  # as 1e4
            return int(float(word))
    raise ValueError(f"={word} must be a whole number, as 1000 or 1e3")


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"={word} must be a number, as 0.001 or 1e-3") from None


def _choice(choices: Sequence[str], word: str) -> str:
    known = {choice.lower(): choice for choice in choices}
    known |= {short: full for short, full in FORMATS.items() if full in choices}
    try:
        return known[word.lower()]
    except KeyError:
        raise ValueError(f"={word} must be one of {', '.join(choices)}") from None


def _check_names(args: Sequence[str], names: Sequence[str], program: str) -> None:
    """Raises `UserError` for a flag that is not among the names, and says the right one."""
    for word in args:
        flag = word.partition("=")[0]
        normal = flag.replace("_", "-")
        if flag.startswith("--") and len(flag) > 2 and normal not in names:
            raise UserError(
                f"there is no {flag}: {advice(normal, names)}; {program} --help lists all flags."
            )


def _sentence(text: str) -> str:
    """Returns what tyro says in a box, without the box and without what follows the first rule.

    The box is of lines or, where the terminal has none, of dashes and spaces.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # colours, where there is a terminal
    rows = [re.sub("[│╭╮╰╯─]", "", line).strip() for line in text.splitlines()]
    title, *rows = itertools.dropwhile(lambda row: not row, rows)
    said = itertools.dropwhile(lambda row: not row.strip("-"), rows)
    said = list(itertools.takewhile(lambda row: row.strip("-"), said))
    if title.startswith("Required"):
        found = [re.match(r"--[\w.-]+|[A-Z]{2,}\b", row) for row in said]
        names = [name[0] for name in found if name]
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
    told = " ".join(said).removeprefix("Error parsing ").replace(": =", "=", 1).rstrip(".")
    told = re.sub(r"^Missing value for argument '(\S+)'.*", r"\1 has no value", told)
    return re.sub(
        r"^Unrecognized options: (.*)",
        r"there is nothing that \1 could mean: flags are spelt --name=value",
        told,
    )
