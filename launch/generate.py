"""Continues a text with the model of a run.

    python launch/generate.py --workdir=runs/quickstart --prompt="The for statement"
    python launch/generate.py --workdir=runs/mine --tokenizer=shards/tokenizer.json --prompt="Once"
    python launch/generate.py --workdir=runs/gpt2 --prompt-ids=464,3290 --temperature=0

On one device, or on as many as --mesh.pipe, --mesh.data and --mesh.model ask for. A text longer
than the model's seq_len is continued from its second half.
"""

import itertools
import sys

from tpipe_jax.config.command_line import exit_status, load_config, parse_for_trained_model
from tpipe_jax.config.flags import GenerateFlags
from tpipe_jax.config.settings import BYTES, BYTES_NAME, Config, ModelConfig
from tpipe_jax.data.tokenizer import Tokenizer, open_tokenizer
from tpipe_jax.errors import UserError


def main() -> None:
    flags = parse_for_trained_model(GenerateFlags, sys.argv[1:], "python launch/generate.py")
    from tpipe_jax.commands.generate import Generator, chooser
    from tpipe_jax.commands.trained_model import load
    from tpipe_jax.devices.startup import find_devices

    if (flags.prompt is None) == (flags.prompt_ids is None):
        raise UserError("give a text to continue, with either --prompt or --prompt-ids.")
    is_text = flags.prompt is not None
    tokenizer = open_tokenizer("--tokenizer", tokenizer_of(flags)) if is_text else None
    devices = find_devices(flags.mesh)
    spec, params, _ = load(flags.workdir, flags.step, Config(mesh=flags.mesh), devices)
    prompt = read_prompt(flags, tokenizer, spec.config.model)
    following = Generator(spec, params).tokens_after(
        prompt, chooser(flags.temperature, flags.top_p, flags.seed)
    )
    tokens = itertools.islice(following, flags.max_tokens)
    print(flags.prompt or " ".join(map(str, prompt)), end="", flush=True)
    for text in tokenizer.stream(tokens) if tokenizer else map(" {}".format, tokens):
        print(text, end="", flush=True)
    print()


def tokenizer_of(flags: GenerateFlags) -> str:
    """The one that is asked for, or that the run has read its text with."""
    path = flags.workdir / "config.json"
    if flags.tokenizer is not None or not path.exists():
        return flags.tokenizer or BYTES_NAME
    return load_config(path).data.tokenizer


def read_prompt(flags: GenerateFlags, tokenizer: Tokenizer | None, model: ModelConfig) -> list[int]:
    """The tokens of the prompt. Raises `UserError` if the model has none of them."""
    if tokenizer is None:
        name, tokens = "--prompt-ids", parse_ids(flags.prompt_ids or "")
    else:
        name, tokens = "--prompt", tokenizer.encode(flags.prompt or "").tolist()
        if not is_of(tokenizer, model):
            raise UserError(
                f"--prompt is text of a tokenizer of {tokenizer.vocab_size} tokens, but the model "
                f"has {model.vocab_size}: give its own with --tokenizer, or --prompt-ids."
            )
    outside = [token for token in tokens if not 0 <= token < model.vocab_size]
    if outside or not tokens:
        what = f"has {outside[0]}, which is no token" if outside else "is empty"
        raise UserError(
            f"{name} {what}: give at least one token, from 0 to {model.vocab_size - 1}."
        )
    if len(tokens) > model.seq_len:
        raise UserError(
            f"{name} has {len(tokens)} tokens, more than config.model.seq_len={model.seq_len}: "
            "shorten it."
        )
    return tokens


def parse_ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--prompt-ids={text} is no list of numbers, as 464,3290.") from None


def is_of(tokenizer: Tokenizer, model: ModelConfig) -> bool:
    """Whether tokens of the model are text; a vocabulary may be filled up to a rounder number."""
    is_shorter = BYTES != tokenizer.vocab_size < model.vocab_size
    return is_shorter or tokenizer.vocab_size == model.vocab_size


if __name__ == "__main__":
    sys.exit(exit_status(main))
