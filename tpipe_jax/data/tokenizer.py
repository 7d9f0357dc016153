"""Text to tokens and back: bytes, or a Hugging Face `tokenizer.json`. No network."""

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tpipe_jax.config.paths import expanded
from tpipe_jax.config.settings import BYTES, BYTES_NAME
from tpipe_jax.data.contents import check_is_file, shortened
from tpipe_jax.data.end_token import end_token
from tpipe_jax.errors import UserError
from tpipe_jax.json_files import parse_json

MOST_BYTES = 2**26  # of a tokenizer.json; of 33 MB is one with 260,000 tokens
MOST_TOKENS = 2**21
MOST_GROWTH = 64  # of a text, where parts of it are replaced
MAX_PENDING = 8  # tokens that may wait for the rest of a character
END_OF_TEXT = "<|endoftext|>"  # GPT-2's token between documents

CountBytes = Callable[[Sequence[int] | np.ndarray], int | None]


@dataclass(frozen=True)
class Tokenizer:
    """Turns text into tokens and back."""

    vocab_size: int
    end: int | None
    """The token between documents, if there is one."""
    encode: Callable[[str], np.ndarray]
    """Text to tokens `[n]`, int32."""
    decode: Callable[[Sequence[int]], str]
    """Tokens to text, with a replacement character where bytes are no text."""
    num_bytes: CountBytes | None
    """The number of bytes in the text of tokens; special tokens have none. None where the tokens
    of a text do not say what its bytes are, and for tokens that swallow spaces beside them."""
    cuts_anywhere: bool = False
    """Whether the parts of a text have its tokens, wherever it is cut."""

    def stream(self, tokens: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
        """Yields the text that each token adds to that of the tokens before; empty until all bytes
        of a character are there.
        """
        seen = list(before)
        first, shown = 0, len(seen)  # tokens shown last are decoded again: spaces depend on them
        for token in tokens:
            seen.append(token)
            text = self.decode(seen[first:])
            if text.endswith("\N{REPLACEMENT CHARACTER}") and len(seen) - shown < MAX_PENDING:
                yield ""
                continue
            yield text[len(self.decode(seen[first:shown])) :]
            first, shown = shown, len(seen)
        if shown < len(seen):
            yield self.decode(seen[first:])[len(self.decode(seen[first:shown])) :]


def open_tokenizer(name: str, value: str, end: str | None = None) -> Tokenizer:
    """Opens the tokenizer that a setting names; `end` names the token that ends a document. What
    looks like a special token in a text is text.

    Raises `UserError` if it cannot be read, or has no such token.
    """
    if value == BYTES_NAME:
        if end is not None:
            raise UserError(
                f"config.data.end_token={end} is no token of {name}=bytes: leave it out, or name a "
                "tokenizer.json."
            )
        return Tokenizer(BYTES, None, _to_bytes, _from_bytes, len, cuts_anywhere=True)
    made = hugging_face(name, value)
    made.encode_special_tokens = True

    vocab_size = max(made.get_vocab().values(), default=0) + 1  # there may be gaps
    if vocab_size > MOST_TOKENS:
        raise UserError(
            f"{name}={value} has a token of number {vocab_size - 1}, but numbers are below "
            f"{MOST_TOKENS}: name another tokenizer."
        )

    def encode(text: str) -> np.ndarray:
        with _in_library(f"{name}={value} cannot read a text"):
            [found] = made.encode_batch_fast([text], add_special_tokens=False)  # without offsets
        tokens = np.array(found.ids, np.int64)
        if tokens.max(initial=0) >= vocab_size:
            raise UserError(
                f"{name}={value} makes token {tokens.max()} of a text, but has {vocab_size}: name "
                "another tokenizer."
            )
        return tokens.astype(np.int32)

    def decode(tokens: Sequence[int]) -> str:
        with _in_library(f"{name}={value} cannot write a text"):
            return made.decode(list(tokens), skip_special_tokens=False)

    return Tokenizer(
        vocab_size, end_token(made, value, end), encode, decode, _byte_counter(made, vocab_size)
    )


def hugging_face(name: str, value: str) -> tokenizers.Tokenizer:
    """Returns the tokenizer that a setting names, as Hugging Face's library has it.

    Bytes become a vocabulary of 256 tokens, which are never merged. Raises `UserError` if the file
    cannot be read.
    """
    if value == BYTES_NAME:
        alphabet = bytes_to_letters()
        made = tokenizers.Tokenizer(models.BPE({c: n for n, c in enumerate(alphabet)}, []))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.decoder = decoders.ByteLevel()
        return made
    path = expanded(name, value)
    with _in_library(f"{name}={value} cannot be read", _REMEDY):
        check_is_file(path)
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
        # Not from_file, which needs a locale that can write the path.
        made = tokenizers.Tokenizer.from_str(content.decode())
        made.no_truncation()
        made.no_padding()
        growth = max(_growth(made.normalizer), _growth(made.decoder))
        if growth > MOST_GROWTH:
            raise ValueError(f"it makes texts {growth:,} times as long")
    return made


_REMEDY = "give bytes, or the tokenizer.json of a Hugging Face model"


@contextmanager
def _in_library(what: str, remedy: str = "name another tokenizer") -> Iterator[None]:
    """Turns whatever the library raises into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # it raises plain ones, and where it panics none of `Exception`
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = shortened(" ".join(str(error).split()))
        raise UserError(f"{what} ({reason}): {remedy}.") from None


def _growth(part: Any) -> int:
    """Returns how many times as long a normalizer or a decoder may make a text by replacing parts
    of it. Steps multiply, so that a few of them could take any memory.
    """
    growth = 1
    for step in _steps(parse_json(part.__getstate__())) if part is not None else []:
        if step["type"] == "Replace":
            pattern = len(step["pattern"].get("String", "")) or 1
            growth *= max(-(-len(step["content"]) // pattern), 1)
        elif step["type"] == "Prepend":
            growth *= max(len(step["prepend"]), 1)
        elif step["type"] == "Precompiled":
            growth *= _longest_replacement(base64.b64decode(step["precompiled_charsmap"] or ""))
    return growth


def _longest_replacement(charsmap: bytes) -> int:
    """Returns the length of the longest text that a map of SentencePiece puts for a character: its
    texts end with NULs, and come after a tree, whose size is in the first four bytes.
    """
    start = 4 + int.from_bytes(charsmap[:4], "little")
    return max(len(text) for text in [b" ", *charsmap[start:].split(b"\0")])


def _steps(state: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the steps of a part of a tokenizer, which may be a sequence of others."""
    for name in ("normalizers", "pretokenizers", "decoders"):
        if name in state:
            return [step for part in state[name] for step in _steps(part)]
    return [state]


def bytes_to_letters() -> list[str]:
    """Returns the letter that byte-level vocabularies write for each byte (Radford et al. 2019).

    Printable bytes of Latin-1 stand for themselves, all others for the letters from 256 on.
    """
    others = iter(range(BYTES, 2 * BYTES))
    is_own = [33 <= n <= 126 or 161 <= n <= 172 or 174 <= n <= 255 for n in range(BYTES)]
    return [chr(n if own else next(others)) for n, own in enumerate(is_own)]


def tokenizer_settings(end: str | None, seq_len: int, kept: dict[str, Any] | None = None) -> str:
    """Returns the tokenizer_config.json that goes with a tokenizer.json, for `transformers`. `end`
    is the token that ends a document, after which the next one begins. `kept` are the settings of
    the folder that the tokenizer comes from.
    """
    names = ("bos_token", "eos_token", *(["unk_token"] if end == END_OF_TEXT else []))
    special = dict.fromkeys(names, end) if end is not None else {}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | special | (kept or {})
    settings |= {"model_max_length": seq_len} | ({} if end is None else {"eos_token": end})
    return json.dumps(settings, indent=2) + "\n"


def train_bpe(documents: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Learns a byte-pair encoding of bytes (Radford et al. 2019) with at most `vocab_size` tokens.

    Raises `UserError` if `vocab_size` leaves no room beside the bytes and `END_OF_TEXT`.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet) + 1:
        raise UserError(
            f"--train-bpe={vocab_size} is too small: {len(alphabet)} bytes and {END_OF_TEXT} are "
            "tokens in any case, so give more than as many."
        )
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(documents, trainer)
    return made


_KEEPS_TEXT = "ByteLevel", "Digits", "Punctuation", "Split", "UnicodeScripts"  # pre-tokenizers


def _byte_counter(made: tokenizers.Tokenizer, vocab_size: int) -> CountBytes | None:
    """Returns a function that counts the bytes of the text of tokens (`Tokenizer.num_bytes`)."""
    if not _writes_each_byte(made):
        return None
    # The vocabulary writes a token with one character for each byte, since a token may be only a
    # part of a character of the text.
    sizes, unknown = np.zeros(vocab_size, np.int64), np.ones(vocab_size, bool)
    for token, number in made.get_vocab().items():
        sizes[number], unknown[number] = len(token), False
    for number, token in made.get_added_tokens_decoder().items():
        sizes[number] = 0 if token.special else len(token.content.encode())
        unknown[number] = token.lstrip or token.rstrip  # it swallows spaces beside it

    def count(tokens: Sequence[int] | np.ndarray) -> int | None:
        given = np.asarray(tokens, np.int64)
        return None if unknown[given].any() else int(sizes[given].sum())

    return count


def _writes_each_byte(made: tokenizers.Tokenizer) -> bool:
    """Whether the tokens of a text have a letter for each of its bytes, and no others: nothing
    changes the text before, as with a space in front, and no byte is unknown.
    """
    model = made.model
    is_plain = (
        isinstance(made.decoder, decoders.ByteLevel)
        and isinstance(model, models.BPE)
        and not (model.continuing_subword_prefix or model.end_of_word_suffix)
        and set(bytes_to_letters()) <= made.get_vocab().keys()
    )
    if not is_plain or made.pre_tokenizer is None:
        return False
    normalizers = made.normalizer and parse_json(made.normalizer.__getstate__())
    steps = _steps(parse_json(made.pre_tokenizer.__getstate__()))
    return (
        (not normalizers or normalizers.get("normalizers") == [])
        and any(step["type"] == "ByteLevel" for step in steps)
        and all(
            step["type"] in _KEEPS_TEXT
            and step.get("behavior") != "Removed"
            and not (step["type"] == "ByteLevel" and step["add_prefix_space"])
            for step in steps
        )
    )


def _to_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def _from_bytes(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")
