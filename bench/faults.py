"""What a run of several processes loses by faults: at most the steps since its last checkpoint.

    python bench/faults.py
    python bench/faults.py --faults=8 --seed=3 --kinds kill flip
    python bench/faults.py --processes=4 --faults=20

Trains a small GPT, disturbs it by random faults in random order, and starts it again after each; at
the end its parameters and metrics must be, bit for bit, those of a run that nothing has disturbed.
After each fault the run must have ended by itself, with the status and the words that belong to it,
and go on from the newest checkpoint that is sound. Ends with status 1 where any of this fails.

The table says, for each kind: how often; seconds from the fault to the end of all processes; steps
done twice; seconds from the next start to its first new step, most of which the start takes.
A full disk needs a file system of its own: a tmpfs, which root alone may mount.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tpipe_jax import checkpoint_files
from tpipe_jax.flags import exit_status, parse
from tpipe_jax.launcher import launch

FAULT = "TPIPE_JAX_FAULT"  # what a process is to do to itself, as JSON
EVERY = 5  # steps between checkpoints
MAX_STEPS = 20  # between a start and its fault
TIMEOUT_SECONDS = 8  # of a step
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
    f"--config.train.step-timeout-seconds={TIMEOUT_SECONDS}",
    f"--config.checkpoint.every={EVERY}",
    "--config.checkpoint.keep=3",
]


@dataclass(frozen=True)
class Kind:
    """A kind of fault, and how a run must end by it."""

    statuses: tuple[int, ...]
    words: str = ""
    """That the run must say."""
    is_inside: bool = False
    """Whether a process does it to itself."""
    loses: bool = True
    """Whether steps may be lost."""


KINDS = {
    "kill": Kind((137,), "was ended by SIGKILL"),
    "freeze": Kind((1, 134), "and was killed: it may be the one that hangs"),
    "terminate": Kind((0,), "the same command", loses=False),
    "interrupt": Kind((0,), "the same command", loses=False),
    "raise": Kind((1,), "ZeroDivisionError: a fault", is_inside=True),
    "hang": Kind((1,), "has taken longer than", is_inside=True),
    "kill in a save": Kind((137,), "was ended by SIGKILL", is_inside=True),
    "kill before the name": Kind((137,), "was ended by SIGKILL", is_inside=True),
    "kill in a removal": Kind((137,), "was ended by SIGKILL", is_inside=True),
    "flip": Kind((0,), "the same command"),
    "truncate": Kind((0,), "the same command"),
    "remove": Kind((0,), "the same command"),
    "add": Kind((0,), "the same command"),
    "disk full": Kind((2,), "No space left on device"),
    "workdir gone": Kind((2,), "cannot write"),
    "data cut short": Kind((2,), "cannot be read any more", loses=False),
    "second run": Kind((0,), "the same command", loses=False),
}
DAMAGES = ("flip", "truncate", "remove", "add")


@dataclass(frozen=True)
class Outcome:
    """What a fault came to."""

    kind: str
    detected_seconds: float
    lost_steps: int
    recovery_seconds: float


class Run:
    """A run that has been started: what it prints, and where it is."""

    def __init__(self, args: argparse.Namespace, workdir: Path, fault: dict[str, Any]) -> None:
        self.workdir, self.lines = workdir, list[str]()
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [
                sys.executable,
                __file__,
                *SETTINGS,
                f"--workdir={workdir}",
                f"--config.data.train={args.data}",
                f"--config.train.num-steps={args.num_steps}",
                f"--config.mesh.pipe={args.processes}",
                f"--local-processes={args.processes}",
            ],
            env=os.environ | {FAULT: json.dumps(fault)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def children(self) -> list[int]:
        pid = self.process.pid
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def step(self) -> int:
        """The last one logged."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        return json.loads(whole[-1])["step"] if whole else 0

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
        return self.process.returncode

    def fail(self, why: str) -> NoReturn:
        for pid in (*self.children(), self.process.pid):
            os.kill(pid, signal.SIGKILL)
        sys.exit(f"{''.join(self.lines[-60:])}\nFAILED: {why}; {self.workdir}")


def main() -> None:
    args = parse_args()
    random.seed(args.seed)
    kinds = [name for name in KINDS if name in args.kinds]
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "disk"
        disk.mkdir()
        is_mounted = mount(disk)
        if not is_mounted and "disk full" in kinds:
            print("no tmpfs can be mounted here, so no disk is filled")
            kinds.remove("disk full")
        args.data = Path(folder) / "data.txt"
        args.data.write_text("".join(f"{i} squared is {i * i}.\n" for i in range(20000)))
        args.num_steps = (MAX_STEPS + 2 * EVERY) * (args.faults + 1)
        os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # for a quick start
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(folder) / "programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        try:
            names = [kinds[i % len(kinds)] for i in range(args.faults)]
            random.shuffle(names)
            soak(args, names, disk / "run", Path(folder) / "undisturbed")
        finally:
            if is_mounted:
                subprocess.run(["umount", "--lazy", disk], check=False)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=3 * len(KINDS))
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    return parser.parse_args()


def mount(disk: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def soak(args: argparse.Namespace, names: list[str], workdir: Path, undisturbed: Path) -> None:
    print(f"seed {args.seed}: {len(names)} faults, {args.processes} processes", flush=True)
    start = time.monotonic()
    run = Run(args, undisturbed, {})
    if run.end(args.num_steps):
        run.fail("the run that nothing disturbs has failed")
    print(f"{args.num_steps} steps undisturbed: {time.monotonic() - start:.0f} s", flush=True)
    outcomes = []
    for number, name in enumerate(names):
        outcome = disturb(args, name, workdir)
        outcomes.append(outcome)
        print(
            f"{number + 1:3} {name:22} ended in {outcome.detected_seconds:5.1f} s, "
            f"{outcome.lost_steps:3} steps lost",
            flush=True,
        )
    run = Run(args, workdir, {})
    if status := run.end(args.num_steps):
        run.fail(f"the last start ended with status {status}")
    compare(workdir, undisturbed, args.num_steps)
    print(f"\n{'fault':22} {'times':>5} {'ended in, s':>14} {'lost steps':>12} {'recovery, s':>12}")
    for name in KINDS:
        if own := [outcome for outcome in outcomes if outcome.kind == name]:
            seconds = [outcome.detected_seconds for outcome in own]
            steps = [outcome.lost_steps for outcome in own]
            recovery = statistics.median(outcome.recovery_seconds for outcome in own)
            print(
                f"{name:22} {len(own):5} {statistics.median(seconds):7.1f}, {max(seconds):5.1f} "
                f"{statistics.median(steps):7.0f}, {max(steps):3} {recovery:12.1f}"
            )
    print(f"{len(outcomes)} faults; medians and maxima. Bitwise the undisturbed run at the end.")


def disturb(args: argparse.Namespace, name: str, workdir: Path) -> Outcome:
    """Starts the run, which must go on from its newest sound checkpoint, and does this to it."""
    kind, process = KINDS[name], random.randrange(args.processes)
    sound = sound_steps(workdir)
    first = sound[0] if sound else 0
    num_steps = random.randint(1, MAX_STEPS) if sound else 2 * EVERY + 5
    saved = (first // EVERY + random.choice((1, 2))) * EVERY  # a step that is saved
    if name in ("kill before the name", "kill in a removal"):
        process = 0  # which does both
        saved = (first // EVERY + 4) * EVERY  # when there are others to remove
    at = saved if "kill in" in name or "kill before" in name else first + num_steps
    inside = {"kind": name, "process": process, "step": at} if kind.is_inside else {}

    run = Run(args, workdir, inside)
    is_early = not kind.is_inside and name not in (*DAMAGES, "second run") and random.random() < 0.3
    if sound:
        is_early = False if name in ("disk full", "workdir gone", "data cut short") else is_early
        run.wait_for(lambda: any("continuing after step" in line for line in run.lines) or is_early)
    if is_early and sound:
        run.wait_for(lambda: any(" hosts" in line for line in run.lines))
        time.sleep(random.uniform(0.2, 2))  # while programs are compiled
    else:
        run.wait_for(lambda: run.step() > first or bool(inside))
    recovery = time.monotonic() - run.started
    if not inside and not (is_early and sound):
        run.wait_for(lambda: run.step() >= at)
    restore = outside_fault(args, name, run, process) if not inside else lambda: None
    injected = time.monotonic()
    if inside:
        run.wait_for(lambda: run.step() >= min(at, saved) - 1 or run.process.poll() is not None)
        injected = time.monotonic()
    status = run.end()
    detected = time.monotonic() - injected
    restore()
    last = run.step() if any("ms/step" in line for line in run.lines) else 0

    said = "".join(run.lines)
    if status not in kind.statuses or kind.words not in said:
        sys.exit(f"{said[-6000:]}\nFAILED: {name} of process {process} ended with {status}")
    continued = [line for line in run.lines if "continuing after step" in line]
    if sound and not is_early and f"continuing after step {first}\n" not in continued[0]:
        sys.exit(f"{said[-3000:]}\nFAILED: it should have gone on from step {first}")
    if name in DAMAGES:
        damage(workdir, name)
    remaining = sound_steps(workdir)
    lost = max(last - (remaining[0] if remaining else 0), 0)
    if lost > (0 if not kind.loses else 2 * EVERY + (MAX_STEPS if name in DAMAGES else 0)):
        sys.exit(f"{said[-3000:]}\nFAILED: {name} lost {lost} steps")
    return Outcome(name, detected, lost, recovery)


def outside_fault(
    args: argparse.Namespace, name: str, run: Run, process: int
) -> Callable[[], None]:
    """Does it; returns what undoes it once the run has ended."""
    signals = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "terminate": signal.SIGTERM}
    workdir = run.workdir
    if name in signals:
        os.kill(run.children()[process], signals[name])
    elif name in ("interrupt", *DAMAGES):
        run.process.send_signal(signal.SIGINT)
    elif name == "disk full":
        ballast = workdir.parent / "ballast"
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass
        return ballast.unlink
    elif name == "workdir gone":
        away = workdir.with_name("away")
        workdir.rename(away)

        def bring_back() -> None:
            shutil.rmtree(workdir, ignore_errors=True)
            away.rename(workdir)

        return bring_back
    elif name == "data cut short":
        content = args.data.read_bytes()
        os.truncate(args.data, 100)
        return lambda: args.data.write_bytes(content) and None
    elif name == "second run":
        other = Run(args, workdir, {})
        status = other.end()
        if status != 2 or "another run is at work" not in "".join(other.lines):
            run.fail(f"a second run ended with status {status}: {''.join(other.lines)}")
        run.process.send_signal(signal.SIGTERM)
    return lambda: None


def sound_steps(workdir: Path) -> list[int]:
    """Of the checkpoints that are as they were written, the newest first."""

    def is_sound(step: int) -> bool:
        try:
            checkpoint_files.check(workdir / "checkpoints" / str(step))
        except checkpoint_files.DamagedError:
            return False
        return True

    folder = workdir / "checkpoints"
    return (
        [n for n in checkpoint_files.list_steps(folder) if is_sound(n)] if folder.exists() else []
    )


def damage(workdir: Path, name: str) -> None:
    """Damages a file of the newest checkpoint."""
    newest = workdir / "checkpoints" / str(sound_steps(workdir)[0])
    path = random.choice(sorted(p for p in newest.rglob("*") if p.is_file()))
    content = bytearray(path.read_bytes())
    if name == "flip":
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        path.write_bytes(content)
    elif name == "truncate":
        os.truncate(path, random.randrange(len(content)))
    elif name == "remove":
        path.unlink()
    else:
        path.with_name("foreign").write_bytes(content)


def compare(workdir: Path, undisturbed: Path, num_steps: int) -> None:
    """Bit for bit; of metrics, all but times."""

    def arrays(folder: Path) -> dict[str, bytes]:
        last = folder / "checkpoints" / str(num_steps)
        return {str(p.relative_to(last)): p.read_bytes() for p in last.rglob("*") if p.is_file()}

    def metrics(folder: Path) -> list[dict[str, float]]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        timed = ("seconds", "tokens_per_second")
        return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in lines]

    expected = arrays(undisturbed)
    assert len(expected) > 50, "the undisturbed run has not saved its state"
    if arrays(workdir) != expected:
        sys.exit("FAILED: the parameters are not those of the undisturbed run")
    if metrics(workdir) != metrics(undisturbed):
        sys.exit("FAILED: the metrics are not those of the undisturbed run")


def disturb_oneself(kind: str, step: int) -> None:
    """Prepares the fault in this process."""
    from tpipe_jax import checkpoint, step_log

    begin, write = step_log.StepLog.begin, checkpoint._write

    def kill(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def disturbed_begin(*args: Any) -> None:
        if args[1] == step and kind == "raise":
            raise ZeroDivisionError("a fault")
        if args[1] == step and kind == "hang":
            time.sleep(10**6)
        begin(*args)

    def disturbed_write(folder: Path, parts: Any) -> Any:
        if folder.name == f"{step}{checkpoint_files.SAVING}":
            write(folder, parts[: len(parts) // 2])
            kill()
        return write(folder, parts)

    def disturbed_sync(folder: Path) -> None:
        if folder.name == f"{step}{checkpoint_files.SAVING}":
            kill()  # when all is written, and the folder is to get its name

    def disturbed_delete(path: Path) -> None:
        if path.suffix == checkpoint_files.REMOVING:
            next(p for p in path.rglob("*") if p.is_file()).unlink()
            kill()

    step_log.StepLog.begin = disturbed_begin  # pyrefly: ignore[bad-assignment]
    if kind == "kill in a save":
        checkpoint._write = disturbed_write
    elif kind == "kill before the name":
        checkpoint_files._sync_folder = disturbed_sync
    elif kind == "kill in a removal":
        checkpoint_files._delete = disturbed_delete


def work(*args: Any) -> None:
    from tpipe_jax.train import train

    train(*args)


def train_disturbed() -> int:
    fault, flags = json.loads(os.environ[FAULT]), parse(sys.argv[1:], "bench/faults.py")
    if fault and flags.processes.process_id == fault["process"]:
        disturb_oneself(fault["kind"], fault["step"])
    return launch(flags, work)


if __name__ == "__main__":
    if FAULT in os.environ:
        sys.exit(exit_status(train_disturbed))
    main()
