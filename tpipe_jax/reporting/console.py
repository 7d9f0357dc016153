"""What the user sees on the terminal: the run at its start, its progress, and its end. No jax."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
)
from rich.table import Column, Table

from tpipe_jax.config.settings import MeshConfig
from tpipe_jax.planning.estimator import predicted_timeline
from tpipe_jax.planning.plan import Plan
from tpipe_jax.planning.planner import TIE, TIMED_ERROR, Alternative, Planning, preferred
from tpipe_jax.reporting.terminal import QuietableConsole, TimeLeft

if TYPE_CHECKING:
    from tpipe_jax.devices.mesh import HostPart


PIPE_COLUMNS = 160  # where there is no terminal, so that lines of a log are whole
NUMBERS = {2: "two", 3: "three", 4: "four"}  # as words
WIDE, NARROW = 80, 60  # columns beyond which a bar has tokens per second, and a drawn bar


@dataclass(frozen=True)
class Ranked:
    """A way to divide the devices."""

    mesh: MeshConfig
    planning: Planning | None = None
    reason: str = ""
    """Why this way cannot be used, if there is no planning."""

    @property
    def seconds(self) -> float:
        """Predicted seconds of a step; infinite where there is no prediction."""
        prediction = self.planning.plan.prediction if self.planning else None
        return prediction.step_seconds if prediction else math.inf


class Console:
    """Prints to the terminal; `is_quiet` silences all but one process of a run."""

    def __init__(self, is_quiet: bool = False) -> None:
        self._rich = QuietableConsole(
            quiet=is_quiet, highlight=False, soft_wrap=True, markup=False, emoji=False
        )
        # A variable such as FORCE_COLOR asks for colours in a pipe too, but bars would fill it.
        self._is_terminal = self._rich.is_terminal and self._rich.file.isatty()
        if not self._is_terminal and "COLUMNS" not in os.environ:
            self._rich.width = PIPE_COLUMNS
        self._progress = self._make_progress("step")

    def say(self, text: str) -> None:
        """Prints a text. On a terminal, words stay whole, but lines that begin with four spaces are
        commands, which can be copied only if the terminal breaks them itself. Characters that the
        output does not have are printed as escapes.
        """
        encoding = self._rich.encoding
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        is_whole = not self._is_terminal or text.startswith("    ")
        self._rich.print(text, soft_wrap=is_whole)

    def show_facts(self, facts: dict[str, str]) -> None:
        """Prints a line for each fact."""
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, text in facts.items():
            table.add_row(name, text)
        self._print_table(table)

    def show_table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], num_names: int = 1
    ) -> None:
        """Prints a table. Its first `num_names` columns are words, the others numbers."""
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for n, name in enumerate(columns):
            table.add_column(name, justify="left" if n < num_names else "right")
        for row in rows:
            table.add_row(*row)
        self._print_table(table)

    def show_hosts(self, parts: Sequence["HostPart"]) -> None:
        """Prints a line for each host, with its part of the mesh."""
        table = Table(title="hosts", title_justify="left", box=None, pad_edge=False)
        for name in ("host", "processes", "devices", "stages", "data shards"):
            table.add_column(name)
        for part in parts:
            numbers = (_ranges(own) for own in (part.stages, part.data_shards))
            table.add_row(part.host, _ranges(part.processes), str(part.num_devices), *numbers)
        self._print_table(table)

    def show_budget(
        self, parts: dict[str, int], remat: str, total_bytes: int, limit_bytes: float | None
    ) -> None:
        """Prints a line for each part of a device's memory, and the compiler's figure for the
        whole.
        """
        title = f"memory of a device with config.memory.remat={remat}"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        table.show_header = False
        table.add_column()
        table.add_column(justify="right")
        for name, num_bytes in parts.items():
            table.add_row(name, _megabytes(num_bytes))
        of_limit = f" of {_megabytes(limit_bytes)}" if limit_bytes is not None else ""
        table.add_row("all of a step, as XLA plans it", _megabytes(total_bytes) + of_limit)
        self._print_table(table)

    def show_plan(self, plan: Plan, chunk_factors: Sequence[float]) -> None:
        """Prints a line for each run of token slices of one length. Batch slices that are alike are
        shown once.
        """
        title = f"plan, schedule {schedule_name(plan)}"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        is_batch = plan.batch_size > 1
        names = ["batch slices of sequences"] * is_batch + ["slices of tokens", "context"]
        for name in names + ["forward ms", "backward ms"] * (plan.prediction is not None):
            table.add_column(name, justify="right")
        kinds = list(zip(plan.batch_slices, plan.token_slices, strict=True))
        for m, kind in enumerate(kinds):
            if kind in kinds[:m]:
                continue
            batch = f"{kinds.count(kind)} x {kind[0]}"
            for start, stop in _runs(kind[1]):
                row = [batch if start == 0 else ""] * is_batch
                row += [f"{stop - start} x {kind[1][start]}"]
                row += [_span([float(sum(kind[1][:n])) for n in range(start, stop)])]
                if plan.prediction:
                    row += [
                        _span([1e3 * seconds for seconds in times[m][start:stop]])
                        for times in (
                            plan.prediction.slice_forward_seconds,
                            plan.prediction.slice_backward_seconds,
                        )
                    ]
                table.add_row(*row)
        self._print_table(table)
        if plan.prediction:
            bubble = predicted_timeline(plan, chunk_factors).bubble
            self.say(
                f"predicted step {milliseconds(plan.prediction.step_seconds)}, of which "
                f"{milliseconds(plan.prediction.outside_seconds)} outside of the pipeline; "
                f"bubble {bubble:.0%}"
            )

    def show_planning(self, planning: Planning) -> None:
        """Prints the plan, whether it is proven optimal, and the times of other schedules and
        plans.
        """
        self.show_plan(planning.plan, planning.chunk_factors)
        if len(planning.options) > 1:
            self._show_options(planning)
        prediction = planning.plan.prediction
        assert prediction is not None
        search = f"{planning.num_solves} programmes solved in {planning.search_seconds:.2f} s"
        of = f" of {planning.plan.schedule}" if len(planning.options) > 1 else ""
        if prediction.is_optimal:
            self.say(f"no plan{of} is faster under these latencies: proven, {search}")
        else:
            bound = milliseconds(prediction.lower_bound_seconds)
            self.say(f"no plan{of} is faster than {bound} under these latencies: {search}")

        def compare(name: str, other: Alternative | None) -> None:
            if other:
                slower = other.step_seconds / (prediction.step_seconds or 1) - 1
                self.say(
                    f"{name} would take {milliseconds(other.step_seconds)}, {slower:+.1%}: "
                    f"{count(other.batch_slices, 'batch slice')} of "
                    f"{count(other.token_slices, 'token slice')}"
                )

        if planning.fastest != planning.plan:
            self._show_fastest(planning)
        compare("unsliced", planning.unsliced)
        compare("the best uniform slices", planning.best_uniform)

    def _show_fastest(self, planning: Planning) -> None:
        """Says why the fastest plan was not taken."""
        fastest, plan = planning.fastest, planning.plan
        assert fastest.prediction is not None
        assert plan.prediction is not None
        num_slices = count(sum(map(len, fastest.token_slices)), "slice")
        shapes = count(len(fastest.shapes), "shape")
        seconds = fastest.prediction.step_seconds
        faster = seconds / plan.prediction.step_seconds - 1
        self.say(
            f"the fastest plan, {num_slices} of {shapes} under {schedule_name(fastest)}, would "
            f"take {milliseconds(seconds)}, {faster:+.1%}: a uniform plan is as fast within the "
            f"error of the latencies, {planning.tolerance:.0%}, so the simplest of these is taken"
        )

    def _show_options(self, planning: Planning) -> None:
        """Prints a line for each schedule, and why the schedule of the plan was taken."""
        title = "schedules, and what a stage keeps of the sequences in it"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for name in ("schedule", "step", "bubble", "kept", ""):
            table.add_column(name, justify="left" if name in ("schedule", "") else "right")
        for option in planning.options:
            assert option.plan.prediction is not None
            is_taken = option.plan.schedule == planning.plan.schedule
            num_bytes = option.activation_bytes
            table.add_row(
                schedule_name(option.plan),
                milliseconds(option.plan.prediction.step_seconds),
                f"{option.bubble:.0%}",
                "unknown" if num_bytes is None else _megabytes(num_bytes),
                _reason(planning) if is_taken else "" if option.fits else "does not fit",
            )
        self._print_table(table)

    def show_ranking(self, ranking: Sequence[Ranked]) -> None:
        """Prints a line for each way to divide the devices."""
        title = "ways to divide the devices, the first is taken"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for name in ("data", "pipe", "model", "step", "bubble"):
            table.add_column(name, justify="right")
        table.add_column("plan")
        for ranked in ranking:
            sizes = [str(getattr(ranked.mesh, axis)) for axis in ("data", "pipe", "model")]
            if ranked.planning is None:
                table.add_row(*sizes, "-", "-", f"does not serve: {ranked.reason}")
                continue
            plan = ranked.planning.plan
            bubble = predicted_timeline(plan, ranked.planning.chunk_factors).bubble
            num_slices = sum(map(len, plan.token_slices))
            slices = f"{schedule_name(plan)}, {count(num_slices, 'slice')}"
            table.add_row(*sizes, milliseconds(ranked.seconds), f"{bubble:.0%}", slices)
        self._print_table(table)

    def show_ways(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a line of figures for each way to divide the devices."""
        title = "ways to divide the devices, the first is taken"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for name in columns:
            table.add_column(name, justify="left" if name == "plan" else "right")
        for row in rows:
            table.add_row(*row)
        self._print_table(table)

    def show_agreement(self, predicted_seconds: float, measured_seconds: float) -> None:
        """Prints how well the predicted and the measured time of a step agree."""
        self.say(
            f"a step takes {milliseconds(measured_seconds)}, predicted were "
            f"{milliseconds(predicted_seconds)}: {predicted_seconds / measured_seconds - 1:+.0%}"
        )

    def show_comparison(self, num_stages: int, sliced_seconds: float, whole_seconds: float) -> None:
        """Prints how long a step takes in token slices, and how long with whole sequences."""
        stages = f"{NUMBERS.get(num_stages, num_stages)} stages"
        self.say(
            f"token slices: {milliseconds(sliced_seconds)} a step; whole sequences on the same "
            f"{stages}: {milliseconds(whole_seconds)}; {whole_seconds / sliced_seconds:.1f} times "
            "as fast"
        )

    def show_commands(self, title: str, commands: dict[str, str]) -> None:
        """Prints commands to copy, a line each, with what each is for."""
        self.say(title)
        for what, words in commands.items():
            self.say(f"    {what:17} {words}")

    @contextmanager
    def profiling(self) -> Iterator[Callable[[int, int], None]]:
        """Shows a bar while latencies are measured; yields a function `(done, all)` to move it."""
        if not self._is_terminal:
            self.say("profiling ...")
        with self.working("profiling") as show:
            yield show

    @contextmanager
    def working(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Shows a bar; yields a function `(done, all)` to move it."""
        progress = self._make_progress(what)
        task = progress.add_task("", total=None, numbers="")
        with progress:
            yield lambda done, num_parts: progress.update(task, completed=done, total=num_parts)

    @contextmanager
    def progress(self, first_step: int, num_steps: int) -> Iterator[None]:
        """Shows a bar while the steps run."""
        self._progress.add_task("", total=num_steps, completed=first_step, numbers="")
        with self._progress:
            yield

    def show_progress(self, step: int, metrics: dict[str, float]) -> None:
        """Moves the bar; where there is no terminal to draw it on, prints a line instead."""
        loss, speed = f"loss {metrics['loss']:.3f}", f"{metrics['tokens_per_second']:,.0f} tokens/s"
        each = f"{metrics['step_seconds'] * 1e3:.0f} ms/step"
        numbers = loss if self._rich.width <= NARROW else f"{loss}  {each}"
        numbers = f"{loss}  {speed}  {each}" if self._rich.width > WIDE else numbers
        self._progress.update(self._progress.task_ids[0], completed=step, numbers=numbers)
        if not self._is_terminal:
            self.say(f"step {step}: {loss}  {speed}  {each}")
        if "eval_loss" in metrics:
            self.say(f"step {step}: held-out loss {metrics['eval_loss']:.3f} nats per token")

    def show_sample(self, prompt: str, continuation: str) -> None:
        """Prints the end of a held-out text, and how the model continues it."""
        self._rich.print("a held-out text ...", style="dim")
        self.say(prompt)
        self._rich.print("... and how the model continues it", style="dim")
        self.say(continuation)

    def _print_table(self, table: Table) -> None:
        for column in table.columns:
            column.overflow = "fold"  # so that nothing is cut off on a narrow terminal
        if self._is_terminal:
            self._rich.print(table, soft_wrap=False)  # cells that are too wide are wrapped
            return
        with self._rich.capture() as printed:
            self._rich.print(table)
        for line in printed.get().splitlines():  # without the spaces that fill up each line
            self.say(line.rstrip())

    def _make_progress(self, what: str) -> Progress:
        bars = [BarColumn(bar_width=40 if self._rich.width > WIDE else 10)]
        return Progress(
            TextColumn(what, markup=False),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            *(bars if self._rich.width > NARROW else []),
            TextColumn("{task.fields[numbers]}", markup=False, table_column=Column(no_wrap=True)),
            TimeLeft(table_column=Column(no_wrap=True)),
            console=self._rich,
            refresh_per_second=2,  # not more often, since the cores are busy
            transient=True,
            disable=not self._is_terminal,
        )


def schedule_name(plan: Plan) -> str:
    """Returns the name of a plan's schedule, with the chunks of each stage if there are several."""
    return plan.schedule + f", {plan.num_chunks} chunks" * (plan.num_chunks > 1)


def _reason(planning: Planning) -> str:
    """Why the plan's schedule is taken."""
    fitting = [option.plan for option in planning.options if option.fits]
    if len(fitting) == 1:
        return "taken: the only one that fits"
    if planning.plan not in fitting:
        assert planning.plan.prediction
        seconds = milliseconds(planning.plan.prediction.step_seconds)
        return f"taken, in simpler slices: {seconds}"
    seconds = sorted(plan.prediction.step_seconds for plan in fitting if plan.prediction)
    usual = preferred(planning.plan.num_stages)
    slack = 1 + (TIMED_ERROR if planning.tolerance else TIE)
    if seconds[1] > slack * seconds[0] or planning.plan.schedule != usual:
        return "taken: the fastest"
    is_one_stage = planning.plan.num_stages == 1
    return f"taken: as fast, {'keeps less' if is_one_stage else 'stages wait less'}"


def milliseconds(seconds: float) -> str:
    """Returns a time in ms as text, with as many digits as are meaningful."""
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


def _megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _ranges(numbers: Sequence[int]) -> str:
    """Returns ascending numbers as text, as 0-3, 5."""
    starts = [n for n in numbers if n - 1 not in numbers]
    stops = [n for n in numbers if n + 1 not in numbers]
    pairs = zip(starts, stops, strict=True)
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in pairs)


def count(number: int, what: str) -> str:
    """Returns a number of things as text, as 1 layer or 2,000 layers."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the start and the stop of each run of equal lengths."""
    starts = [n for n in range(len(lengths)) if n == 0 or lengths[n] != lengths[n - 1]]
    return list(zip(starts, [*starts[1:], len(lengths)], strict=True))


def _span(values: Sequence[float]) -> str:
    """Returns the least and the most of some numbers as text, as 0.84-2.1."""
    ends = [
        f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in (min(values), max(values))
    ]
    return "-".join(dict.fromkeys(ends))
