"""Commands on a run while it trains: what `bench/faults.py --beside` starts at random moments.

Each must end by itself with its own right result: status 0, or 2 with a sentence as long as the run
has no checkpoint.
"""

import json
import random
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from faulty_run import KEPT_EVERY
from tpipe_jax.checkpoint import manifest

PAUSE_SECONDS = 2  # at most, between two commands
LIMIT_SECONDS = 300  # of a command, on a machine with much else to do
PROMPT = "7 squared is"
LOSS = re.compile(r"loss ([\d.]+) nats per token, .* after step (\d+)$", re.M)
NUM_COMPARED = 8  # losses, with those of the undisturbed run's checkpoints


class WrongError(Exception):
    """A command has not done what it should."""


class Beside:
    """Runs commands on a run, one after another, from `__enter__` to `__exit__`."""

    def __init__(self, workdir: Path, folder: Path, data: Path) -> None:
        self.num_done = Counter[str]()
        """How often each command has succeeded."""
        self.num_early = 0
        """How many commands have found no checkpoint yet."""
        self.wrong: list[str] = []
        self._workdir, self._folder, self._data = workdir, folder, data
        self._random = random.Random(str(workdir))
        self._losses: dict[str, str] = {}  # by step; a step that is done again has the same one
        self._plan_before: object = None
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> "Beside":
        self._folder.mkdir()
        (self._folder / "text").write_text(self._data.read_text()[:5000])
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join()

    def check(self, undisturbed: Path) -> None:
        """Ends this process if a result was wrong, also by the undisturbed run's checkpoints."""
        steps = [step for step in sorted(self._losses, key=int) if int(step) % KEPT_EVERY == 0]
        for step in self._random.sample(steps, min(NUM_COMPARED, len(steps))):
            loss = self._loss_of(undisturbed, f"--step={step}")
            if loss != (self._losses[step], step):
                self.wrong.append(f"evaluate: {self._losses[step]} after step {step}, not {loss}")
        counts = ", ".join(f"{name} {n}" for name, n in sorted(self.num_done.items()))
        print(f"beside the run: {counts}; {self.num_early} found no checkpoint yet")
        if self.wrong:
            sys.exit("\n".join(["FAILED beside the run:", *self.wrong]))

    def _work(self) -> None:
        commands: dict[str, Callable[[], bool]] = {
            "plan": self._plan,
            "generate": self._generate,
            "evaluate": self._evaluate,
            "checkpoints": self._checkpoints,
            "export and import": self._exchange,
        }
        while not self._left.wait(self._random.uniform(0, PAUSE_SECONDS)):
            name = self._random.choice(list(commands))
            try:
                is_done = commands[name]()
            except (WrongError, OSError, ValueError, subprocess.TimeoutExpired) as error:
                self.wrong.append(f"{name}: {error}")
                print(f"WRONG beside the run: {name}: {error}", flush=True)
            else:
                self.num_done[name] += is_done
                self.num_early += not is_done

    def _run(self, *args: str) -> str | None:
        """Runs a command on the run. Returns what it prints, or None if there is no checkpoint."""
        folder = self._workdir / "checkpoints"
        is_early = not (folder.exists() and manifest.list_steps(folder))
        done = subprocess.run(
            [sys.executable, "-m", "tpipe_jax", *args],
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT_SECONDS,
        )
        if done.returncode == 0 and not done.stderr:
            return done.stdout
        sentence = re.fullmatch(r"error: .*\n", done.stderr)
        if is_early and done.returncode == 2 and sentence and not done.stdout:
            return None
        raise WrongError(f"status {done.returncode}: {done.stdout}{done.stderr}")

    def _plan(self) -> bool:
        """Plans as the run could, in another folder. The first time measures, others do not."""
        config, workdir = self._workdir / "config.json", self._folder / "plan"
        if not config.exists():
            return False
        own = [f"--config={config}", f"--config.data.train={self._data}", f"--workdir={workdir}"]
        own += [f"--config.plan.{name}=auto" for name in ("token-slices", "batch-slices")]
        text = self._run("plan", *own, "--config.plan.unit-tokens=4") or ""
        whole = json.loads((workdir / "plan.json").read_text())
        plan = {key: whole[key] for key in ("batch_slices", "token_slices", "schedule")}
        if self._plan_before not in (None, plan) or (
            self._plan_before and "latencies as measured before" not in text
        ):
            raise WrongError(f"{plan} instead of {self._plan_before}: {text}")
        self._plan_before = plan
        return True

    def _generate(self) -> bool:
        args = [f"--prompt={PROMPT}", "--max-tokens=8", "--temperature=0"]
        text = self._run("generate", f"--workdir={self._workdir}", *args)
        if text is not None and not (text.startswith(PROMPT) and len(text) > len(PROMPT) + 1):
            raise WrongError(text)
        return text is not None

    def _evaluate(self) -> bool:
        found = self._loss_of(self._workdir)
        if found is None:
            return False
        loss, step = found
        if self._losses.setdefault(step, loss) != loss:
            raise WrongError(f"{loss} after step {step}, before {self._losses[step]}")
        return True

    def _loss_of(self, workdir: Path, *args: str) -> tuple[str, str] | None:
        """Returns the loss of a run, and its step."""
        data = f"--data={self._folder / 'text'}"
        text = self._run("evaluate", f"--workdir={workdir}", data, *args)
        if text is None:
            return None
        if not (match := LOSS.search(text)):
            raise WrongError(text)
        return match[1], match[2]

    def _checkpoints(self) -> bool:
        text = self._run("checkpoints", str(self._workdir))
        if text is not None and "damaged" in text:
            raise WrongError(text)
        return text is not None

    def _exchange(self) -> bool:
        """Exports, imports that into another folder, and exports it again: the same weights."""
        out, other, again = (self._folder / name for name in ("export", "import", "again"))
        for path in (out, other, again):
            shutil.rmtree(path, ignore_errors=True)
        if self._run("convert", "export", f"--workdir={self._workdir}", f"--to={out}") is None:
            return False
        self._run("convert", "import", f"--from={out}", f"--workdir={other}")
        self._run("convert", "export", f"--workdir={other}", f"--to={again}")
        if (out / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes():
            raise WrongError("the weights that were imported are others")
        return True
