"""What the user sees on the terminal: the run at its start, its progress, and how it ended."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jax.sharding import Mesh
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tpipe_jax.config import Config
from tpipe_jax.mesh import layer_counts
from tpipe_jax.model import num_params
from tpipe_jax.plan import Plan
from tpipe_jax.schedule import Schedule


class Console:
    """Prints to the terminal; `is_quiet` silences all but one process of a run."""

    def __init__(self, is_quiet: bool = False) -> None:
        self._rich = RichConsole(quiet=is_quiet, highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self._rich,
            refresh_per_second=2,  # the cores are busy
        )

    def say(self, text: str) -> None:
        self._rich.print(text, markup=False)

    def describe_run(
        self, config: Config, mesh: Mesh, plan: Plan, schedule: Schedule, num_tokens: Sequence[int]
    ) -> None:
        """Model, mesh, data and plan as a table each or a line each."""
        model, counts = config.model, layer_counts(config.model.num_layers, config.mesh.pipe)
        kind = mesh.devices.flat[0].device_kind
        per_stage = (
            f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)}-{max(counts)}"
        )
        facts = Table(show_header=False, box=None, pad_edge=False)
        facts.add_row(
            "model",
            f"{num_params(model):,} parameters: {model.num_layers} layers, width {model.d_model}, "
            f"{model.num_heads} heads, vocabulary {model.vocab_size}, {config.precision.compute}",
        )
        facts.add_row(
            "mesh",
            f"data {config.mesh.data} x pipe {config.mesh.pipe} x model {config.mesh.model} = "
            f"{config.mesh.num_devices} devices ({kind}), {per_stage} layers a stage",
        )
        facts.add_row("data", f"{num_tokens[0]:,} tokens to train on, {num_tokens[1]:,} held out")
        facts.add_row(
            "step",
            f"{config.train.batch_size} sequences of {model.seq_len} tokens, "
            f"{plan.batch_size} a data shard, in {len(schedule.items)} slices",
        )
        self._rich.print(facts)
        table = Table(title="plan", title_justify="left", box=None, pad_edge=False)
        for name in ("batch slice", "sequences", "token slices"):
            table.add_column(name, justify="left" if name == "token slices" else "right")
        for m, (size, token_slices) in enumerate(
            zip(plan.batch_slices, plan.token_slices, strict=True)
        ):
            table.add_row(str(m), str(size), ", ".join(map(str, token_slices)))
        self._rich.print(table)

    @contextmanager
    def progress(self, first_step: int, num_steps: int) -> Iterator[None]:
        """Shows a bar while the steps run."""
        self._progress.add_task("", total=num_steps, completed=first_step, numbers="")
        with self._progress:
            yield

    def show_progress(self, step: int, metrics: dict[str, float]) -> None:
        """Moves the bar; where there is no terminal to draw it on, prints a line instead."""
        numbers = (
            f"loss {metrics['loss']:.3f}  {metrics['tokens_per_second']:,.0f} tokens/s  "
            f"{metrics['step_seconds'] * 1e3:.0f} ms/step"
        )
        self._progress.update(self._progress.task_ids[0], completed=step, numbers=numbers)
        if not self._rich.is_terminal:
            self.say(f"step {step}: {numbers}")
        if "eval_loss" in metrics:
            self.say(f"step {step}: held-out loss {metrics['eval_loss']:.3f} nats per token")

    def show_sample(self, prompt: str, continuation: str) -> None:
        """The end of a held-out text and what the model makes of it."""
        self._rich.print("[dim]a held-out text ...[/dim]")
        self.say(prompt)
        self._rich.print("[dim]... and how the model continues it[/dim]")
        self.say(continuation)
