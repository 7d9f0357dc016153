"""Continues a text with the model of a run.

    python launch/generate.py --workdir=runs/quickstart --prompt="The for statement"
    python launch/generate.py --workdir=runs/gpt2 --prompt-ids=464,3290 --temperature=0

Bytes are text, other tokens are numbers. On one device, or on as many as --mesh.pipe, --mesh.data
and --mesh.model ask for. A text longer than the model's seq_len is continued from its second half.
"""

import codecs
import itertools
import sys
from collections.abc import Callable, Iterable

from tpipe_jax.config import BYTES, Config, ModelConfig, UserError
from tpipe_jax.flags import GenerateFlags, exit_status, parse_after


def main() -> None:
    flags = parse_after(GenerateFlags, sys.argv[1:], "python launch/generate.py")
    from tpipe_jax.generate import Generator, chooser
    from tpipe_jax.mesh import find_devices
    from tpipe_jax.trained import load

    devices = find_devices(flags.mesh)
    config, mesh, params, _ = load(flags.workdir, flags.step, Config(mesh=flags.mesh), devices)
    prompt = read_prompt(flags, config.model)
    following = Generator(config, mesh, params).tokens_after(
        prompt, chooser(flags.temperature, flags.top_p, flags.seed)
    )
    tokens = itertools.islice(following, flags.max_tokens)
    if flags.prompt is None:
        print(*prompt, end="", flush=True)
        show(tokens, lambda token: f" {token}")
    else:
        print(flags.prompt, end="", flush=True)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        show(tokens, lambda token: decoder.decode(bytes([token])))


def read_prompt(flags: GenerateFlags, model: ModelConfig) -> list[int]:
    """The tokens of the prompt. Raises `UserError` if the model has none of them."""
    if (flags.prompt is None) == (flags.prompt_ids is None):
        raise UserError("there is nothing to continue: give --prompt, or --prompt-ids.")
    if flags.prompt_ids is not None:
        name, tokens = "--prompt-ids", parse_ids(flags.prompt_ids)
    else:
        name, tokens = "--prompt", list((flags.prompt or "").encode())
        if model.vocab_size != BYTES:
            raise UserError(
                f"--prompt is text, but the model has a vocabulary of {model.vocab_size} tokens "
                "rather than bytes: give numbers with --prompt-ids."
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


def show(tokens: Iterable[int], to_text: Callable[[int], str]) -> None:
    """Prints each token as it comes."""
    for token in tokens:
        print(to_text(token), end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(exit_status(main))
