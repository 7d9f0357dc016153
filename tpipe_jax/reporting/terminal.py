"""Parts of rich, changed: a console whose reader may go away, and the time left. No jax."""

from rich.console import Console
from rich.progress import ProgressColumn, Task
from rich.text import Text

from tpipe_jax.files import note_once


class QuietableConsole(Console):
    """Goes on where nobody reads the output, for programs that train by themselves. Commands decide
    that by their own outputs (runtime/outputs.py).
    """

    def on_broken_pipe(self) -> None:
        """Is quiet from now on; rich would end the program."""
        self.quiet = True
        note_once("nobody reads the output any more: it is left out, and the run goes on")


class TimeLeft(ProgressColumn):
    """The time that is left, and says so: it could be taken for the time that has passed."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        if task.finished or left is None:
            return Text("")
        minutes, seconds = divmod(int(left), 60)
        hours, minutes = divmod(minutes, 60)
        start = f"{hours}:{minutes:02}" if hours else f"{minutes}"
        return Text(f"{start}:{seconds:02} left")
