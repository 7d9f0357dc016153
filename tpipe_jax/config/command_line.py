"""The command line: a config file, then flags that override its fields."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import tyro

from tpipe_jax.config.fields import Range, check_field
from tpipe_jax.config.flags import (
    ExportFlags,
    FilePlanFlags,
    Flags,
    ImportFlags,
    ProcessFlags,
    TokenizeFlags,
    TrainedModelFlags,
)
from tpipe_jax.config.settings import Config, from_dict
from tpipe_jax.config.user_code import load_file
from tpipe_jax.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


_CONSTRUCTORS = tyro.constructors.ConstructorRegistry()


@_CONSTRUCTORS.primitive_rule
def _true_or_false(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[bool] | None:
    """Reads truth values as `true` or `false`, capitalised or not; tyro alone wants a capital."""
    if info.type is not bool:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{true,false}",
        instance_from_str=lambda words: {"true": True, "false": False}[words[0].lower()],
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value).lower()],
        choices=("true", "false", "True", "False"),  # config.json and Python spell them so
    )


def exit_status(program: Callable[[], int | None]) -> int:
    """Runs a program and returns its exit status, or prints its `UserError` and returns 2.

    When the user stops the program (Ctrl-C), the process ends at once with status 130.
    """
    try:
        return program() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # sys.exit would wait for a thread that still saves a checkpoint


def parse_convert(args: list[str], program: str) -> ImportFlags | ExportFlags:
    """Reads the command line, whose first word is `import` or `export`."""
    return tyro.extras.subcommand_cli_from_dict(
        {"import": ImportFlags, "export": ExportFlags},
        description="Weights from and to the folders of Hugging Face's GPT-2.",
        args=args,
        prog=program,
    )


def parse_tokenize(args: list[str], program: str) -> TokenizeFlags:
    """Reads the command line of `TokenizeFlags`. Raises `UserError` for unusable values."""
    flags = tyro.cli(TokenizeFlags, args=args, prog=program)
    _check_fields("--", flags)
    if not flags.inputs:
        raise UserError("there is nothing to tokenize: name files or folders.")
    if flags.train_bpe is not None and flags.tokenizer != "bytes":
        raise UserError(
            f"--train-bpe={flags.train_bpe} makes a tokenizer, and --tokenizer={flags.tokenizer} "
            "is one: give either."
        )
    return flags


def _check_fields(prefix: str, fields: Any) -> None:
    """Raises `UserError` for a value out of its range."""
    for name, hint in get_type_hints(type(fields), include_extras=True).items():
        options = (hint, *get_args(hint))  # an optional field has a union type
        if any(isinstance(note, Range) for o in options for note in getattr(o, "__metadata__", ())):
            check_field(f"{prefix}{name.replace('_', '-')}", hint, getattr(fields, name))


def parse_for_trained_model(
    kind: type[TrainedModelFlags], args: list[str], program: str
) -> TrainedModelFlags:
    """Reads the command line of a program that uses a trained model. Raises `UserError` for a
    value out of its range.
    """
    with _CONSTRUCTORS:
        flags = tyro.cli(kind, args=args, prog=program, config=(tyro.conf.FlagConversionOff,))
    _check_fields("--", flags)
    _check_fields("--mesh.", flags.mesh)
    return flags


def parse_file_plan(args: list[str], program: str) -> FilePlanFlags:
    """Reads the command line of `FilePlanFlags`. Raises `UserError` for a value out of range."""
    flags = tyro.cli(FilePlanFlags, args=args, prog=program)
    for name in ("num_stages", "batch_size", "seq_len", "num_layers"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least 1.")
    is_interleaved = flags.schedule in ("auto", "interleaved")
    if flags.chunks is not None and (flags.chunks < 2 or not is_interleaved):
        raise UserError(
            f"--chunks={flags.chunks} is a number of at least 2, for --schedule=interleaved."
        )
    limit = flags.memory_limit_gib
    if limit is not None and not 0 <= limit < math.inf:
        raise UserError(f"--memory-limit-gib={limit} must be a number that is not negative.")
    factors = flags.stage_factors
    if factors and (len(factors) != flags.num_stages or not all(0 < a < math.inf for a in factors)):
        raise UserError(
            f"--stage-factors must be {flags.num_stages} positive numbers, one for each stage: "
            f"they are {' '.join(map(str, factors))}."
        )
    return flags


def parse(args: list[str], program: str) -> Flags:
    """Reads the command line of a run. Prints help, or tyro's error message, and exits if needed.

    Raises `UserError` for a config file that cannot be used or a setting out of its range.
    """
    path, rest = _take_config(args)
    default = Flags(load_config(path), Path("runs") / path.stem)
    with _CONSTRUCTORS:
        flags = tyro.cli(
            Flags,
            args=rest,
            default=default,
            prog=program,
            config=(tyro.conf.FlagConversionOff,),  # all settings are spelt --name=value
        )
    _check_processes(flags.processes)
    return flags


def load_config(path: Path) -> Config:
    """Returns the settings in a run's config.json, or runs a Python file and returns the settings
    that its `get_config()` returns. Raises `UserError` if the file does not give settings.
    """
    if not path.is_file():
        known = ", ".join(sorted(os.path.relpath(p) for p in CONFIGS.glob("*.py")))
        raise UserError(f"--config={path} is no file: give a config file, such as {known}.")
    if path.suffix == ".json":
        try:
            return from_dict(json.loads(path.read_text()))
        except (UserError, ValueError, AttributeError) as error:
            raise UserError(f"--config={path} is not the config.json of a run ({error}).") from None
    if path.suffix != ".py":
        raise UserError(
            f"--config={path} is not a Python file: its name must end in .py, or .json."
        )
    try:
        config = load_file(path).get_config()
    except UserError:
        raise
    except Exception as error:  # any error of the file's code is for its author to mend
        raise UserError(
            f"--config={path} cannot be used ({type(error).__name__}: {error}): "
            "it must define get_config() -> Config."
        ) from error
    if not isinstance(config, Config):
        raise UserError(f"--config={path}: get_config() must return a tpipe_jax.config.Config.")
    return config


def without_option(args: list[str], name: str) -> list[str]:
    """Returns the arguments without `--name=value` or `--name value`; the name may have _ for -."""
    rest, words = [], iter(args)
    for word in words:
        option, is_assigned, _ = word.partition("=")
        if option.replace("_", "-") != f"--{name}":
            rest.append(word)
        elif not is_assigned:
            next(words, None)
    return rest


def _check_processes(flags: ProcessFlags) -> None:
    """Raises `UserError` if a flag is out of its range, or if flags contradict each other."""
    for name, least in (
        ("num_processes", 1),
        ("local_processes", 1),
        ("join_seconds", 1),
        ("max_restarts", 0),
    ):
        value = getattr(flags, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least {least}.")
    by_hand = [flags.coordinator, flags.num_processes, flags.process_id]
    if flags.local_processes is not None and [*by_hand, flags.local_device_ids] != [None] * 4:
        raise UserError(
            f"--local-processes={flags.local_processes} starts all processes itself: leave out "
            "--coordinator, --num-processes, --process-id and --local-device-ids."
        )
    if flags.coordinator is None or flags.num_processes is None or flags.process_id is None:
        if by_hand != [None] * 3:
            raise UserError(
                "--coordinator, --num-processes and --process-id belong together: give all three, "
                "or none where a scheduler starts the processes."
            )
        return
    host, _, port = flags.coordinator.rpartition(":")
    if not (host and port.isdecimal() and int(port) < 2**16):
        raise UserError(
            f"--coordinator={flags.coordinator} is not of the form HOST:PORT, with a port below "
            "65536."
        )
    if not 0 <= flags.process_id < flags.num_processes:
        raise UserError(
            f"--process-id={flags.process_id} must be at least 0 and below "
            f"--num-processes={flags.num_processes}."
        )


def _take_config(args: list[str]) -> tuple[Path, list[str]]:
    """Returns the FILE of the last --config=FILE or --config FILE, and all other arguments.

    Among these, --config.mesh=auto is replaced by --config.mesh.auto=True.
    """
    path, rest, words = CONFIGS / "quickstart.py", [], iter(args)
    for word in words:
        if word == "--config":
            path = Path(next(words, ""))
        elif word.startswith("--config="):
            path = Path(word.removeprefix("--config="))
        elif word == "--config.mesh=auto":
            rest.append("--config.mesh.auto=True")
        else:
            rest.append(word)
    return path, rest
