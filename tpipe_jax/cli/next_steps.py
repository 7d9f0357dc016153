"""What can be done with a trained model, as commands that work as they are printed. No jax."""

import itertools
import shlex
from pathlib import Path

from tpipe_jax.config.invocation import command
from tpipe_jax.config.settings import BYTES, BYTES_NAME, Config


def next_steps(config: Config, workdir: Path, num_steps: int) -> dict[str, str]:
    """Returns commands for a run of `num_steps` steps, each by what it is for."""
    run, block = f"--workdir={shlex.quote(str(workdir))}", config.model.block
    named = run
    if config.model.has_own_block:
        named += f" --config.model.block={shlex.quote(block)}"
    is_text = config.data.tokenizer != BYTES_NAME or config.model.vocab_size == BYTES
    prompt = '--prompt="The "' if is_text else "--prompt-ids=1,2,3"
    picture, timeline = (shlex.quote(str(workdir / n)) for n in ("loss.png", "timeline.png"))
    steps = {
        "look at": f"{picture} and {timeline}",
        "all numbers": f"tensorboard --logdir={shlex.quote(str(workdir))}",
        "continue a text": f"{command('generate')} {named} {prompt}",
        "measure the loss": f"{command('evaluate')} {named}",
        "train longer": f"{command('train')} {named} --config.train.num-steps={2 * num_steps}",
    }
    if not config.model.has_own_block:
        folder = shlex.quote(str(workdir / "transformers"))
        steps["export it"] = f"{command('convert')} export {run} --to={folder}"
    text = "docs" if Path("docs").is_dir() else "FILE"
    new = f"{command('train')} --workdir={new_workdir('own')} --config.data.train={text}"
    return steps | {"your own text": new}


def new_workdir(name: str) -> Path:
    """Returns a folder for a run that does not exist yet: runs/NAME, runs/NAME-2 and so on."""
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    return next(path for path in (Path("runs") / name for name in names) if not path.exists())
