"""What a run of several processes loses by faults: at most the steps since its last checkpoint.

    python bench/faults.py
    python bench/faults.py --faults=8 --seed=3 --kinds kill flip
    python bench/faults.py --processes=4 --faults=20
    python bench/faults.py --beside --faults=60 --kinds kill terminate hangup

Trains a small GPT, disturbs it by random faults in random order, and starts it again after each; at
the end its parameters and metrics must be, bit for bit, those of a run that nothing has disturbed.
After each fault the run must have ended by itself, with the status and the words that belong to it,
and go on from the newest checkpoint that is sound. Ends with status 1 where any of this fails.

With --beside, other commands (bench/beside.py) work on the run all the time: plan, generate,
evaluate, list checkpoints, export and import. The run keeps only two checkpoints, so it removes old
ones while they are read. All must have their own right results.

The table says, for each kind: how often; seconds from the fault to the end of all processes; steps
done twice; seconds from the next start to its first step.
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
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from beside import Beside
from faulty_run import EVERY, Fault, Run
from tpipe_jax.checkpoint import manifest

MAX_STEPS = 20  # between a start and its fault
STEP_SECONDS = 8, 60  # the limit of a step, alone and with other commands beside


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
    "terminate": Kind((143,), "the same command", loses=False),
    "interrupt": Kind((130,), "the same command", loses=False),
    "hangup": Kind((129,), "the same command", loses=False),
    "hangup, outputs closed": Kind((129,), loses=False),
    "launcher killed": Kind((-signal.SIGKILL,), loses=False),
    "output not read": Kind((143,), loses=False),
    "raise": Kind((1,), "ZeroDivisionError: a fault", is_inside=True),
    "hang": Kind((1,), "has taken longer than", is_inside=True),
    "kill in a save": Kind((137,), "was ended by SIGKILL", is_inside=True),
    "kill before the name": Kind((137,), "was ended by SIGKILL", is_inside=True),
    "kill in a removal": Kind((137,), "was ended by SIGKILL", is_inside=True),
    "flip": Kind((130,), "the same command"),
    "truncate": Kind((130,), "the same command"),
    "remove": Kind((130,), "the same command"),
    "add": Kind((130,), "the same command"),
    "disk full": Kind((2,), "No space left on device"),
    "workdir gone": Kind((2,), "cannot write"),
    "data cut short": Kind((2,), "cannot be read any more", loses=False),
    "second run": Kind((143,), "the same command", loses=False),
}
DAMAGES = ("flip", "truncate", "remove", "add")
# Those that may also come before the first step, and those beside which other commands may run.
EARLY = ("kill", "freeze", "terminate", "interrupt", "hangup", "launcher killed")
BESIDE = ("kill", "terminate", "interrupt", "hangup", "launcher killed", "output not read")


@dataclass(frozen=True)
class Outcome:
    """What a fault came to."""

    kind: str
    ended_seconds: float
    lost_steps: int
    recovery_seconds: float | None = None
    """None if the next start was disturbed before its first step."""


def main() -> None:
    args = parse_args()
    random.seed(args.seed)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # of the runs too, where nohup has started this
    allowed = BESIDE if args.beside else list(KINDS)
    kinds = [name for name in KINDS if name in (args.kinds or allowed)]
    if not set(kinds) <= set(allowed):
        sys.exit(f"--beside goes with the kinds {', '.join(BESIDE)}")
    args.keep = 2 if args.beside else 3
    args.step_timeout = STEP_SECONDS[args.beside]
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
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    parser.add_argument("--beside", action="store_true")
    return parser.parse_args()


def mount(disk: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def soak(args: argparse.Namespace, names: list[str], workdir: Path, undisturbed: Path) -> None:
    print(f"seed {args.seed}: {len(names)} faults, {args.processes} processes", flush=True)
    start = time.monotonic()
    run = Run(args, undisturbed, None, is_kept=args.beside)
    if run.end(args.num_steps):
        run.fail("the run that nothing disturbs has failed")
    print(f"{args.num_steps} steps undisturbed: {time.monotonic() - start:.0f} s", flush=True)
    beside = Beside(workdir, undisturbed.with_name("beside"), args.data) if args.beside else None
    outcomes: list[Outcome] = []
    with beside or nullcontext():
        for number, name in enumerate(names):
            run, outcome = disturb(args, name, workdir)
            if outcomes:
                outcomes[-1] = replace(outcomes[-1], recovery_seconds=run.start_seconds)
            outcomes.append(outcome)
            print(
                f"{number + 1:3} {name:22} ended in {outcome.ended_seconds:5.1f} s, "
                f"{outcome.lost_steps:3} steps lost",
                flush=True,
            )
        run = Run(args, workdir, None)
        if status := run.end(args.num_steps):
            run.fail(f"the last start ended with status {status}")
        outcomes[-1] = replace(outcomes[-1], recovery_seconds=run.start_seconds)
    compare(workdir, undisturbed, args.num_steps)
    if beside:
        beside.check(undisturbed)
    print_table(outcomes)


def print_table(outcomes: list[Outcome]) -> None:
    print(f"\n{'fault':22} {'times':>5} {'ended in, s':>14} {'lost steps':>12} {'recovery, s':>12}")
    for name in KINDS:
        if own := [outcome for outcome in outcomes if outcome.kind == name]:
            ended = [outcome.ended_seconds for outcome in own]
            lost = [outcome.lost_steps for outcome in own]
            started = [o.recovery_seconds for o in own if o.recovery_seconds is not None]
            print(
                f"{name:22} {len(own):5} {statistics.median(ended):7.1f}, {max(ended):5.1f} "
                f"{statistics.median(lost):7.0f}, {max(lost):3} "
                + (f"{statistics.median(started):12.1f}" if started else f"{'-':>12}")
            )
    print(f"{len(outcomes)} faults; medians and maxima. Bitwise the undisturbed run at the end.")


def disturb(args: argparse.Namespace, name: str, workdir: Path) -> tuple[Run, Outcome]:
    """Starts the run, which must go on from its newest sound checkpoint, and does this to it."""
    kind, sound = KINDS[name], sound_steps(workdir)
    first = sound[0] if sound else 0
    fault = draw_fault(name, args.processes, first)
    is_early = name in EARLY and first > 0 and random.random() < 0.3

    is_prepared = kind.is_inside or name == "second run"
    run, undo = Run(args, workdir, fault if is_prepared else None), _nothing
    if is_early:
        run.wait_for(lambda: run.has_said(" hosts"))
        time.sleep(random.uniform(0.2, 2))  # while programs are compiled
    elif not kind.is_inside:
        run.wait_for(lambda: run.step >= fault.step)
    if not kind.is_inside:
        run.fault_at = time.monotonic()
        undo = inflict(args, name, run, fault.process)
    status = run.end()
    ended_seconds = time.monotonic() - run.fault_at
    undo()
    for path in (workdir / "checkpoints").glob(f"*{manifest.DAMAGED}"):
        shutil.rmtree(path)  # the disk is small

    if status not in kind.statuses or not run.has_said(kind.words):
        run.fail(f"{fault} ended it with status {status}")
    if first and run.step and not run.has_said(f"continuing after step {first}\n"):
        run.fail(f"it should have gone on from step {first}")
    if name in DAMAGES:
        damage(workdir, name)
    remaining = sound_steps(workdir)
    done = run.step
    if done and not kind.loses:  # else its metrics are still those of the start before
        done = max(done, run.logged_step())
    lost_steps = max(done - (remaining[0] if remaining else 0), 0)
    if lost_steps > (2 * EVERY if kind.loses else 0) + (MAX_STEPS if name in DAMAGES else 0):
        run.fail(f"{fault} lost {lost_steps} steps")
    return run, Outcome(name, ended_seconds, lost_steps)


def draw_fault(name: str, num_processes: int, first: int) -> Fault:
    """Where and when, in a run that goes on from step `first`."""
    process = random.randrange(num_processes)
    step = first + random.randint(1, MAX_STEPS) if first else 2 * EVERY + 5
    if name in ("kill in a save", "kill before the name"):
        step = (first // EVERY + random.choice((1, 2))) * EVERY
    if name in ("kill before the name", "kill in a removal"):
        process = 0  # which does both
    return Fault(name, process, step)


def _nothing() -> None:
    pass


def inflict(args: argparse.Namespace, name: str, run: Run, process: int) -> Callable[[], object]:
    """Does it from outside; returns what undoes it once the run has ended."""
    signals = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "terminate": signal.SIGTERM}
    workdir = run.workdir
    if name in signals:
        os.kill(run.children()[process], signals[name])
    elif name == "hangup":
        run.process.send_signal(signal.SIGHUP)
    elif name == "hangup, outputs closed":
        run.stop_reading()
        run.process.send_signal(signal.SIGHUP)
    elif name == "launcher killed":
        run.kill_launcher()
    elif name == "output not read":
        run.stop_reading()
        step = run.logged_step()
        run.wait_for(lambda: run.logged_step() > step + EVERY)  # it goes on
        run.fault_at = time.monotonic()
        run.process.send_signal(signal.SIGTERM)
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
        return lambda: args.data.write_bytes(content)
    elif name == "second run":
        other = Run(args, workdir, None)
        status = other.end()
        if status != 2 or not other.has_said("another run is at work"):
            other.fail(f"a second run ended with status {status}")
        run.process.send_signal(signal.SIGTERM)
    return _nothing


def sound_steps(workdir: Path) -> list[int]:
    """Of the checkpoints that are as they were written, the newest first."""

    def is_sound(step: int) -> bool:
        try:
            manifest.check(workdir / "checkpoints" / str(step))
        except manifest.DamagedError:
            return False
        return True

    folder = workdir / "checkpoints"
    return [n for n in manifest.list_steps(folder) if is_sound(n)] if folder.exists() else []


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
    """Bit for bit; of metrics, all but times and memory."""

    def arrays(folder: Path) -> dict[str, bytes]:
        last = folder / "checkpoints" / str(num_steps)
        return {str(p.relative_to(last)): p.read_bytes() for p in last.rglob("*") if p.is_file()}

    def metrics(folder: Path) -> list[dict[str, float]]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        timed = ("seconds", "per_second", "per_device", "mfu", "memory_gib")
        return [{k: v for k, v in line.items() if not k.endswith(timed)} for line in lines]

    expected = arrays(undisturbed)
    assert len(expected) > 50, "the undisturbed run has not saved its state"
    if arrays(workdir) != expected:
        sys.exit("FAILED: the parameters are not those of the undisturbed run")
    if metrics(workdir) != metrics(undisturbed):
        sys.exit("FAILED: the metrics are not those of the undisturbed run")


if __name__ == "__main__":
    main()
