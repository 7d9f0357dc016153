"""`tpipe`: finds the program of the first word and runs it on the others. No jax."""

import importlib
import sys

from tpipe_jax.config.habits import nearest
from tpipe_jax.config.invocation import command
from tpipe_jax.errors import UserError
from tpipe_jax.runtime.exits import exit_status
from tpipe_jax.runtime.jax_options import set_needed
from tpipe_jax.version import __version__

COMMANDS = {
    "train": "train a GPT, or go on with a run",
    "plan": "find the fastest slices, from measurements here or from a file",
    "compile": "see whether a step fits GPUs or TPUs that are not here",
    "generate": "continue a text with a trained model",
    "evaluate": "measure the loss of a trained model on data",
    "convert": "exchange weights with Hugging Face",
    "tokenize": "turn text into token shards to train on",
    "checkpoints": "list the checkpoints of a run, and check them",
    "plot": "draw the losses of one run or several",
    "doctor": "show versions, devices and memory, for bug reports",
}


def run(name: str, args: list[str]) -> int:
    """Runs a command on its arguments; returns the exit status."""

    def program() -> int | None:
        set_needed()
        module = importlib.import_module(f"tpipe_jax.cli.{name}")
        return module.main(args, command(name))

    return exit_status(program)


def main() -> int:
    """Runs `tpipe` with the arguments of this process; returns the exit status."""
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        return exit_status(lambda: print(_help()))
    if args[0] == "--version":
        return exit_status(lambda: print(f"tpipe_jax {__version__}"))
    if args[0] in COMMANDS:
        return run(args[0], args[1:])
    return exit_status(lambda: _refuse(args[0]))


def _help() -> str:
    program = command("").rstrip()
    lines = [f"usage: {program} COMMAND ...", "", "Trains GPTs through a pipeline of token slices."]
    lines += ["", *(f"    {program} {name:12} {what}" for name, what in COMMANDS.items())]
    lines += [
        "",
        f"{program} COMMAND --help has examples and all flags. Begin with: {program} train",
    ]
    return "\n".join(lines)


def _refuse(word: str) -> None:
    near = nearest(word, list(COMMANDS))
    what = f"did you mean {near}" if near else f"it is one of {', '.join(COMMANDS)}"
    raise UserError(f"there is no command {word}: {what}; {command('')}--help lists them all.")
