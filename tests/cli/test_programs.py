"""The programs of the command line: help, mistakes on a terminal, and what they print next."""

import contextlib
import io
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tpipe_jax.cli.main import COMMANDS, main, run
from tpipe_jax.cli.next_steps import next_steps
from tpipe_jax.config import command_line
from tpipe_jax.config.command_line import parse
from tpipe_jax.config.flags import GpuPlanFlags
from tpipe_jax.config.invocation import command
from tpipe_jax.config.settings import (
    Config,
    DataConfig,
    ModelConfig,
)
from tpipe_jax.errors import UserError
from tpipe_jax.runtime.exits import exit_status
from tpipe_jax.version import __version__


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["launch/multihost.py"], "python launch/plan.py and python launch/multihost.py"),
        (
            ["/a b/launch/plan.py"],
            "python '/a b/launch/plan.py' and python '/a b/launch/multihost.py'",
        ),
        (["/usr/bin/tpipe", "train"], "tpipe plan and tpipe train"),
        (["/x/tpipe_jax/__main__.py"], "python -m tpipe_jax plan and python -m tpipe_jax train"),
        ([""], "python -m tpipe_jax plan and python -m tpipe_jax train"),
    ],
)
def test_commands_are_named_as_this_one_was(
    argv: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", argv)
    assert f"{command('plan')} and {command('train')}" == expected


def test_errors_are_red_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def fail() -> None:
        raise UserError("this is wrong.")

    assert exit_status(fail) == 2
    assert capsys.readouterr().err == "error: this is wrong.\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert exit_status(fail) == 2
    assert capsys.readouterr().err == "\x1b[31merror: this is wrong.\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert exit_status(fail) == 2
    assert capsys.readouterr().err == "error: this is wrong.\n"


def test_a_run_may_be_named_as_elsewhere():
    args = ["--workdir=runs/mine"]
    assert command_line.parse_plot(args, "program").workdirs == (Path("runs/mine"),)
    assert command_line.parse_checkpoints(args, "program").workdir == Path("runs/mine")


OWN = Config(ModelConfig(block="my block.py:B"))


TOKENS = Config(ModelConfig(vocab_size=500), data=DataConfig("tokens.bin"))


TEXT = Config(ModelConfig(vocab_size=500), data=DataConfig("text", tokenizer="tokenizer.json"))


@pytest.mark.parametrize("config", [Config(), OWN, TOKENS, TEXT])
def test_next_steps_can_be_read_and_name_what_the_run_needs(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["tpipe", "train"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "own").mkdir(parents=True)
    workdir = Path("runs") / "a run"
    steps = next_steps(config, workdir, 300)
    assert ("export it" in steps) == (config is not OWN)
    assert (
        "--prompt-ids" in steps["continue a text"]
        if config is TOKENS
        else "--prompt=" in str(steps)
    )
    assert steps["your own text"].endswith("--workdir=runs/own-2 --config.data.train=FILE")
    for line in steps.values():
        program, *args = shlex.split(line)
        if program != "tpipe":
            continue
        name, *args = args
        if name == "train":
            flags = parse(args, "program")
        else:
            flags = getattr(command_line, f"parse_{name}")(args, "program")
        if "own-2" not in line:
            assert flags.workdir == workdir
            named = flags.config.model.block if name == "train" else getattr(flags, "block", None)
            assert named == config.model.block or name == "convert"
    assert parse(shlex.split(steps["train longer"])[2:], "p").config.train.num_steps == 600
    (tmp_path / "docs").mkdir()
    assert next_steps(config, workdir, 3)["your own text"].endswith("--config.data.train=docs")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_helps(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["tpipe", name])
    with contextlib.suppress(SystemExit):  # tyro exits after its help
        run(name, ["--help"])
    text = capsys.readouterr().out
    examples = text.split("Examples:\n")[1].split("\n\n")[0].splitlines()
    assert len(examples) >= 3
    assert all(line.startswith(f"    tpipe {name}") for line in examples)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_help_can_be_read(name: str, monkeypatch: pytest.MonkeyPatch):
    """By the parser of the command, which `read_flags` shows its examples to."""
    seen: list[str] = []
    monkeypatch.setattr(command_line, "read_flags", lambda *a: seen.extend(a[3]) or a)
    parser = getattr(command_line, "parse" if name == "train" else f"parse_{name}")
    first = ["import", "export"] if name == "convert" else [None]
    for word in first:
        with contextlib.suppress(AttributeError, UserError):
            parser([word] if word else [], "program")
    monkeypatch.undo()
    assert seen
    for example in seen:
        args = shlex.split(example.partition(" | ")[0])
        if "--help" not in args:
            word = [w for w in first if w and ("--to" in example) == (w == "export")]
            parser([*word, *args], "program")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["trian"], "there is no command trian: did you mean train;"),
        (["dance"], "there is no command dance: it is one of train, plan, compile,"),
    ],
)
def test_a_command_that_does_not_exist(
    args: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(sys, "argv", ["tpipe", *args])
    assert main() == 2
    assert said in capsys.readouterr().err


def test_version_and_the_list_of_commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "argv", ["tpipe", "--version"])
    assert main() == 0
    assert capsys.readouterr().out == f"tpipe_jax {__version__}\n"
    monkeypatch.setattr(sys, "argv", ["tpipe"])
    assert main() == 0
    text = capsys.readouterr().out
    assert all(f"    tpipe {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("generate", "--workdir is missing; "),
        ("checkpoints", "RUN is missing; "),
        ("convert import", "--from and --workdir are missing; "),
    ],
)
def test_what_is_missing_is_named(
    name: str, expected: str, encoding: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
    name, *args = name.split()
    with pytest.raises(UserError) as error:
        getattr(command_line, f"parse_{name}")(args, "program")
    assert str(error.value).startswith(expected)


def test_flags_of_planning_from_a_file_need_the_file():
    with pytest.raises(UserError, match=r"^--batch-size goes with --latency=FILE"):
        command_line.parse_plan(["--num_stages=4", "--batch-size=1"][::-1], "program")


def test_forms_of_planning_exclude_each_other():
    parse = command_line.parse_plan
    with pytest.raises(UserError, match=r"^--hosts goes with --gpu=NAME"):
        parse(["--hosts=4"], "program")
    with pytest.raises(UserError, match=r"^--gpu and --latency plan from different times"):
        parse(["--gpu=a100", "--latency=latency.json"], "program")
    with pytest.raises(UserError, match=r"a1000.*a100"):
        parse(["--gpu=a1000"], "program")
    flags = parse(["--gpu=v100", "--hosts=2", "--config.mesh=auto", "--tokens=3e9"], "program")
    assert isinstance(flags, GpuPlanFlags)
    assert (flags.gpu, flags.hosts, flags.gpus_per_host, flags.tokens) == ("v100", 2, 8, 3e9)
    assert flags.config.mesh.auto


def on_a_terminal(*args: str) -> str:
    """What a person sees of a command, without colours."""
    ours, theirs = pty.openpty()
    env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200"}
    command = [sys.executable, "-m", "tpipe_jax", *args]
    done = subprocess.run(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, check=False)
    os.close(theirs)
    assert done.returncode == 2
    seen = b""
    with contextlib.suppress(OSError):  # Linux raises it at the end
        while part := os.read(ours, 2**16):
            seen += part
    os.close(ours)
    assert seen.startswith(b"\x1b[31merror: ")
    return re.sub(r"\x1b\[[0-9;]*m", "", seen.decode()).strip()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["generate", "--prompt=x"], "--workdir is missing; "),
        (["evaluate", "--workdir=run", "run"], "there is nothing that run could mean: "),
        (["train", "--config.train.num-steps"], "--config.train.num-steps has no value; "),
        (["train", "--config.plan.schedule=x"], "--config.plan.schedule=x must be one of auto, "),
        (["plan", "--latency=x", "--num-stages=4"], "--batch-size and --seq-len are missing; "),
    ],
)
def test_mistakes_are_told_on_a_terminal_too(args: list[str], expected: str):
    assert on_a_terminal(*args).startswith(f"error: {expected}")
