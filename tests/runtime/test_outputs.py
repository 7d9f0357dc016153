"""Outputs that are closed or cannot be written: a command ends, a run goes on and says so once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpipe_jax.runtime.outputs import NOTE

COMMAND = """
import os, sys
from pathlib import Path
from tpipe_jax.runtime import outputs
from tpipe_jax.runtime.exits import exit_status

def program():
    if sys.argv[2:] == ["run"]:
        outputs.leave_out(workdir)
    with (workdir / "data").open("wb", buffering=0) as data:
        for n in range(3):
            print("step", n, flush=True)
            print("error", n, file=sys.stderr, flush=True)
            for descriptor in (1, 2):  # as libraries do
                try:
                    os.write(descriptor, b"library")
                except OSError:
                    pass
        data.write(b"data")
    (workdir / "done").touch()

workdir = Path(sys.argv[1])
sys.exit(exit_status(program))
"""


def run(folder: Path, redirect: str, *args: str) -> subprocess.CompletedProcess[str]:
    line = f'exec "$0" -c "$1" "$2" {" ".join(args)} {redirect}'
    return subprocess.run(
        ["bash", "-c", line, sys.executable, COMMAND, str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def said(name: str, why: str) -> str:
    return f"note: {name} cannot be written ({why}): it is left out, and the run goes on\n"


FULL, CLOSED = "No space left on device", "Bad file descriptor"


@pytest.mark.parametrize("python", ["", "PYTHONUNBUFFERED=1"])
@pytest.mark.parametrize(
    ("redirect", "on_stderr", "in_workdir"),
    [
        (">/dev/full", said("standard output", FULL), ""),
        (">&-", said("standard output", CLOSED), ""),
        ("2>&-", "", said("standard error", CLOSED)),
        ("2>/dev/full", "", said("standard error", FULL)),
        (">&- 2>&-", "", said("standard output", CLOSED) + said("standard error", CLOSED)),
        (">&- 2>&- <&-", "", said("standard output", CLOSED) + said("standard error", CLOSED)),
        ("> >(exec true; ) 2>&1", None, None),
        (">/dev/null 2>/dev/null", "", ""),
    ],
)
def test_a_run_goes_on_and_says_once_what_is_lost(
    redirect: str,
    on_stderr: str | None,
    in_workdir: str | None,
    python: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    if python:
        monkeypatch.setenv(*python.split("="))
    done = run(tmp_path, redirect, "run")
    assert done.returncode == 0
    assert (tmp_path / "done").exists()
    assert (tmp_path / "data").read_bytes() == b"data"  # no library has written into it
    if on_stderr is not None:
        assert [x for x in done.stderr.splitlines() if x.startswith("note:")] == (
            on_stderr.splitlines()
        )
        note = tmp_path / NOTE
        assert (note.read_text() if note.exists() else "") == in_workdir


def test_a_command_says_that_its_output_cannot_be_written(tmp_path: Path):
    done = run(tmp_path, ">/dev/full")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: standard output cannot be written ({FULL}): send it elsewhere.\n"
    )


def test_a_command_does_not_need_standard_error(tmp_path: Path):
    for redirect in ("2>/dev/full", "2>&-"):
        done = run(tmp_path, redirect)
        assert done.returncode == 0
        assert "step 2" in done.stdout
        assert (tmp_path / "data").read_bytes() == b"data"


def test_an_output_that_is_slow_and_does_not_block_is_waited_for(tmp_path: Path):
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    program = (
        "import sys; from tpipe_jax.runtime import outputs; outputs.prepare(); "
        "print('x' * 300000, flush=True)"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=theirs)
    os.close(theirs)
    with open(ours, "rb") as file:
        assert len(file.read()) == 300001
    assert child.wait(60) == 0


def test_what_cannot_be_said_yet_is_said_when_there_is_a_workdir(tmp_path: Path):
    program = (
        "import sys; from pathlib import Path; from tpipe_jax.runtime import outputs\n"
        "outputs.prepare(); workdir = Path(sys.argv[1]) / 'run'; outputs.leave_out(workdir)\n"
        "print('a'); sys.stdout.flush(); workdir.mkdir(); print('b'); sys.stdout.flush()"
    )
    line = 'exec "$0" -c "$1" "$2" >&- 2>&-'
    subprocess.run(["bash", "-c", line, sys.executable, program, tmp_path], check=True)
    assert (tmp_path / "run" / NOTE).read_text() == said("standard output", CLOSED)
