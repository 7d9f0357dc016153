"""Texts to continue as tokens of a trained model, and its tokens as text."""

import contextlib
from pathlib import Path

from tpipe_jax.config.config_files import load_config
from tpipe_jax.config.own_runs import RUN_FILE, check_named
from tpipe_jax.config.settings import BYTES, BYTES_NAME, Config, ModelConfig
from tpipe_jax.data.carried import with_kept_tokenizer
from tpipe_jax.data.tokenizer import Tokenizer, open_tokenizer
from tpipe_jax.errors import UserError


def tokenizer_of(
    workdir: Path, name: str | None = None, remedy: str = "add --tokenizer={}"
) -> Tokenizer:
    """Opens the tokenizer of this name, or the one with which the run has read its text.

    Raises `UserError` if it cannot be read, or if a stranger's run names one outside of its folder;
    `remedy` says how to name it, `{}`.
    """
    path = workdir / RUN_FILE
    if name is None and path.exists():
        data = with_kept_tokenizer(load_config(path).data, workdir)
        check_named(path, Config(data=data), {"data.tokenizer": remedy})
        return open_tokenizer("config.data.tokenizer", data.tokenizer, data.end_token)
    return open_tokenizer("--tokenizer", name or BYTES_NAME)


def ends_of(workdir: Path, tokenizer: Tokenizer | None) -> set[int]:
    """Returns the tokens that end a document in what the run has read: that of the tokenizer, and
    the separator of the run's token files.

    Without a tokenizer it is that of the run, if that can be read.
    """
    path = workdir / RUN_FILE
    separator = load_config(path).data.separator if path.exists() else None
    if tokenizer is None:
        with contextlib.suppress(UserError):
            tokenizer = tokenizer_of(workdir)
    own = tokenizer.end if tokenizer else None
    return {end for end in (separator, own) if end is not None}


def read_prompt(path: Path) -> str:
    """Returns the text of a file, as it is. Raises `UserError` if it cannot be read."""
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise UserError(
            f"--prompt-file={path} cannot be read ({error.strerror}): name a file of text."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"--prompt-file={path} is not UTF-8 at byte {error.start}: save it as UTF-8."
        ) from None


def encode_prompt(
    name: str, text: str, tokenizer: Tokenizer, model: ModelConfig, remedy: str
) -> list[int]:
    """Returns the tokens of a text, which errors call `name`.

    Raises `UserError` if the model has none of them; `remedy` says what to do about a tokenizer
    that is not the model's.
    """
    if not _is_of(tokenizer, model):
        raise UserError(
            f"{name} is text of a tokenizer of {tokenizer.vocab_size} tokens, but the model "
            f"has {model.vocab_size}: {remedy}."
        )
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line that are no text become surrogates
        raise UserError(f"{name} is not UTF-8: write it in UTF-8.") from None
    return check_prompt(name, tokenizer.encode(text).tolist(), model)


def parse_ids(text: str, model: ModelConfig) -> list[int]:
    """Returns the tokens of a list of numbers. Raises `UserError` if it is none."""
    try:
        tokens = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--prompt-ids={text} is no list of numbers, as 464,3290.") from None
    return check_prompt("--prompt-ids", tokens, model)


def check_prompt(name: str, tokens: list[int], model: ModelConfig) -> list[int]:
    """Returns the tokens. Raises `UserError` if they are none, too many, or not of the model."""
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


def _is_of(tokenizer: Tokenizer, model: ModelConfig) -> bool:
    """Whether tokens of the model are text; a vocabulary may be filled up to a rounder number."""
    is_shorter = BYTES != tokenizer.vocab_size < model.vocab_size
    return is_shorter or tokenizer.vocab_size == model.vocab_size
