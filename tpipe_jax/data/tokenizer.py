"""Text to tokens and back: bytes, or a Hugging Face `tokenizer.json`. No network."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tpipe_jax.config.settings import BYTES, BYTES_NAME
from tpipe_jax.errors import UserError

MAX_PENDING = 8  # tokens that may wait for the rest of a character
END_OF_TEXT = "<|endoftext|>"  # GPT-2's token between documents


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
    num_bytes: Callable[[Sequence[int] | np.ndarray], int] | None
    """The number of bytes in the text of tokens; special tokens have none. None where the text of a
    token depends on its neighbours."""

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yields the text that each token adds; empty until all bytes of a character are there."""
        seen: list[int] = []
        first = shown = 0  # tokens shown last are decoded again, since spaces depend on them
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


def open_tokenizer(name: str, value: str) -> Tokenizer:
    """Opens the tokenizer that a setting names. Raises `UserError` if it cannot be read."""
    if value == BYTES_NAME:
        return Tokenizer(BYTES, None, _to_bytes, _from_bytes, len)
    made = hugging_face(name, value)

    def encode(text: str) -> np.ndarray:
        return np.array(made.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(tokens: Sequence[int]) -> str:
        return made.decode(list(tokens), skip_special_tokens=False)

    vocab_size = max(made.get_vocab().values()) + 1  # there may be gaps
    end = made.token_to_id(END_OF_TEXT)
    return Tokenizer(vocab_size, end, encode, decode, _byte_counter(made, vocab_size))


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
    try:
        made = tokenizers.Tokenizer.from_file(value)
        made.no_truncation()
        made.no_padding()
    except Exception as error:  # the library raises plain ones
        raise UserError(
            f"{name}={value} cannot be read ({error}): give bytes, or the tokenizer.json of a "
            "Hugging Face model."
        ) from None
    return made


def bytes_to_letters() -> list[str]:
    """Returns the letter that byte-level vocabularies write for each byte (Radford et al. 2019).

    Printable bytes of Latin-1 stand for themselves, all others for the letters from 256 on.
    """
    others = iter(range(BYTES, 2 * BYTES))
    is_own = [33 <= n <= 126 or 161 <= n <= 172 or 174 <= n <= 255 for n in range(BYTES)]
    return [chr(n if own else next(others)) for n, own in enumerate(is_own)]


def tokenizer_settings(text: str, seq_len: int) -> str:
    """Returns the tokenizer_config.json that goes with a tokenizer.json, for `transformers`."""
    has_end = tokenizers.Tokenizer.from_str(text).token_to_id(END_OF_TEXT) is not None
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT) if has_end else {}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": seq_len}
    return json.dumps(settings | special, indent=2) + "\n"


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


def _byte_counter(
    made: tokenizers.Tokenizer, vocab_size: int
) -> Callable[[Sequence[int] | np.ndarray], int] | None:
    if not isinstance(made.decoder, decoders.ByteLevel):
        return None
    # The vocabulary writes a token with one character for each byte, since a token may be only a
    # part of a character of the text.
    sizes = np.zeros(vocab_size, np.int64)
    for token, number in made.get_vocab().items():
        sizes[number] = len(token)
    for number, token in made.get_added_tokens_decoder().items():
        sizes[number] = 0 if token.special else len(token.content.encode())
    return lambda tokens: int(sizes[np.asarray(tokens)].sum())


def _to_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def _from_bytes(tokens: Sequence[int]) -> str:
    return bytes(tokens).decode(errors="replace")
