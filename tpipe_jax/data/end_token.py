"""Finds the token of a tokenizer that ends a document."""

import json
from pathlib import Path

import tokenizers

from tpipe_jax.errors import UserError
from tpipe_jax.json_files import read_json

# Names that tokenizers have for it, the most specific first. What ends a turn of a conversation
# (<|im_end|>, <|eot_id|>) does not end a document.
NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<end_of_text>")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")  # of Hugging Face, beside it


def end_token(made: tokenizers.Tokenizer, path: str, given: str | None) -> int | None:
    """Returns the token that ends a document: the one that is given, else the one that the settings
    beside the tokenizer name, else one with a usual name. Returns None if there is none.

    Raises `UserError` if the tokenizer has no token of the given name.
    """
    if given is not None:
        token = _number(made, given)
        if token is None:
            raise UserError(
                f"config.data.end_token={given} is no token of {path}: name one that it has, or "
                "leave it out."
            )
        return token
    for name in (*_in_settings(Path(path).expanduser()), *NAMES):
        if (token := _number(made, name)) is not None:
            return token
    return None


def _number(made: tokenizers.Tokenizer, name: str) -> int | None:
    try:
        return made.token_to_id(name)
    except UnicodeEncodeError:  # half a character
        return None


def write_end(folder: Path, made: tokenizers.Tokenizer, end: int | None) -> None:
    """Writes the settings of Hugging Face that name the end of a text, beside a tokenizer."""
    name = None if end is None else made.id_to_token(end)
    if name is not None:
        content = json.dumps({"eos_token": name}) + "\n"
        (folder / SETTINGS[0]).write_text(content, encoding="utf-8")


def _in_settings(path: Path) -> list[str]:
    """Returns the names that settings of Hugging Face beside a tokenizer give the end of a text.
    Links that lead elsewhere than to the folder of the tokenizer are not followed.
    """
    names, folder = [], path.parent
    for file in SETTINGS:
        try:
            own = (folder / file).resolve()
            # In Hugging Face's cache, all files are links to files of one folder.
            if own.parent not in (folder.resolve(), path.resolve().parent) or not own.is_file():
                continue
            value = read_json(own)["eos_token"]
            name = value["content"] if isinstance(value, dict) else value
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):
            continue
        if isinstance(name, str):
            names.append(name)
    return names
