"""A run of `bench/faulty.py` and what it prints: what `bench/faults.py` starts and watches."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from faulty import FAULT, HAPPENS

PROGRAM = Path(__file__).with_name("faulty.py")
EVERY = 5  # steps between checkpoints
KEPT_EVERY = 25  # the same, where all are kept
LIMIT_SECONDS = 120  # in which a fault must have ended the run, on a slow machine too

SETTINGS = [
    "--config.model.num-layers=4",
    "--config.model.d-model=16",
    "--config.model.num-heads=2",
    "--config.model.seq-len=16",
    "--config.plan.token-slices=9,7",
    "--config.plan.batch-slices=uniform:1",
    "--config.train.batch-size=4",
    "--config.train.log-every=1",
    "--config.train.eval-every=25",
    "--config.train.eval-batches=2",
    "--config.train.sample-tokens=0",
    "--config.train.trace-step=0",  # what is measured differs from run to run
    "--config.train.compare-steps=0",
]


@dataclass(frozen=True)
class Fault:
    """A fault as it will happen."""

    kind: str
    process: int
    step: int


class Run:
    """A run that has been started, and what it prints."""

    def __init__(
        self, args: argparse.Namespace, workdir: Path, inside: Fault | None, is_kept: bool = False
    ) -> None:
        self.workdir, self.lines = workdir, list[str]()
        self.step = 0
        """The last one that it has printed."""
        self.start_seconds: float | None = None
        """From the start to its first step."""
        self.fault_at = self._started = time.monotonic()
        """When a process did something to itself."""
        self.process = subprocess.Popen(
            [
                sys.executable,
                PROGRAM,
                *SETTINGS,
                f"--workdir={workdir}",
                f"--config.data.train={args.data}",
                f"--config.train.num-steps={args.num_steps}",
                f"--config.mesh.pipe={args.processes}",
                f"--local-processes={args.processes}",
                f"--config.checkpoint.keep={args.num_steps if is_kept else args.keep}",
                f"--config.checkpoint.every={KEPT_EVERY if is_kept else EVERY}",
                f"--config.train.step-timeout-seconds={args.step_timeout}",
            ],
            env=os.environ | {FAULT: json.dumps(inside and vars(inside))},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._orphans = list[int]()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            now = time.monotonic()
            if match := re.search(r"\] step (\d+): loss", line):
                self.step = int(match[1])
                self.start_seconds = self.start_seconds or now - self._started
            if HAPPENS in line:
                self.fault_at = now
            self.lines.append(line)

    def logged_step(self) -> int:
        """The last step in its metrics."""
        path = self.workdir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1].splitlines()
        return json.loads(whole[-1])["step"] if whole else 0

    def stop_reading(self) -> None:
        """Closes its outputs on this side, as a terminal or a reader that goes away."""
        assert self.process.stdout is not None
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, self.process.stdout.fileno())  # the reader finds its end, and goes
        os.close(nothing)

    def kill_launcher(self) -> None:
        """Kills the launcher alone; `end` then waits for its processes too."""
        self._orphans = self.children()
        self.process.kill()

    def has_said(self, words: str) -> bool:
        return any(words in line for line in self.lines)

    def children(self) -> list[int]:
        pid = self.process.pid
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Raises `SystemExit` if the run ends before, or it takes too long."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.fail("it did not come to where it should be disturbed")
            time.sleep(0.01)

    def end(self, seconds: float = LIMIT_SECONDS) -> int:
        """Waits for its end; returns the exit status."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.fail(f"it had not ended after {seconds} s")
        self._reader.join()
        deadline = time.monotonic() + seconds
        while any(map(_is_running, self._orphans)):
            if time.monotonic() > deadline:
                self.fail("its processes have not ended with their launcher")
            time.sleep(0.01)
        return self.process.returncode

    def fail(self, why: str) -> NoReturn:
        if self.process.poll() is None:
            for pid in (*self.children(), self.process.pid):
                os.kill(pid, signal.SIGKILL)
        for pid in filter(_is_running, self._orphans):
            os.kill(pid, signal.SIGKILL)
        sys.exit(f"{''.join(self.lines[-60:])}\nFAILED: {why}")


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # ended, and not yet noticed by init
