"""Outputs that nobody reads to the end, or that cannot show each character."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpipe_jax.errors import UserError
from tpipe_jax.runtime.exits import exit_status


def head(
    *args: str, python: tuple[str, ...] = (), num_lines: int = 1
) -> tuple[list[str], int, str]:
    """The first lines of a command whose output is closed then, its exit status and its errors."""
    command = [sys.executable, *python, "-m", "tpipe_jax", *args]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stderr is not None
    lines = [child.stdout.readline() for _ in range(num_lines)]
    child.stdout.close()
    with child.stderr as errors:
        err = errors.read()
    return lines, child.wait(timeout=100), err


@pytest.mark.parametrize("python", [(), ("-u",)])
@pytest.mark.parametrize("args", [["--help"], ["plan", "--help"]])
def test_help_of_which_nothing_is_read(args: list[str], python: tuple[str, ...]):
    assert head(*args, python=python, num_lines=0) == ([], 141, "")


def test_a_list_of_which_the_first_line_is_read(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    for n in range(3000):  # more than a pipe holds
        (tmp_path / "checkpoints" / f"{'x' * 30}{n}").touch()
    lines, status, err = head("checkpoints", str(tmp_path))
    assert lines[0].split() == ["step", "MB"]
    assert (status, err) == (141, "")


def test_other_pipes_that_break_are_errors():
    def program() -> None:
        raise BrokenPipeError("of something else")

    with pytest.raises(BrokenPipeError, match="of something else"):
        exit_status(program)


def test_what_the_output_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch):
    out, err = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(err, "utf-8"))

    def program() -> None:
        print("b\xe4r")
        raise UserError(f"there is no {os.fsdecode(b'b' + bytes([0xFF]))}.")  # no UTF-8

    assert exit_status(program) == 2
    sys.stderr.flush()
    assert out.getvalue() == b"b\\xe4r\n"
    assert err.getvalue() == b"error: there is no b\\udcff.\n"
