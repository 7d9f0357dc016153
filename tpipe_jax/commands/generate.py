"""Continues a text token by token, on the attention caches of the stages."""

import itertools
from collections.abc import Callable, Iterator, Sequence, Set

import jax
import numpy as np
from jax.stages import Compiled

from tpipe_jax.devices.exchanges import compile_checked
from tpipe_jax.devices.mesh import put_rows
from tpipe_jax.model.block import Params
from tpipe_jax.pipeline.decode import empty_decode_caches, make_decode
from tpipe_jax.pipeline.spec import StageSpec

PART = 64  # tokens of a prompt that are read at a time

Choose = Callable[[np.ndarray], int]  # from logits `[V]` to a token


def chooser(
    temperature: float, top_p: float = 1.0, seed: int = 0, top_k: int | None = None
) -> Choose:
    """Returns a function that chooses the next token from logits.

    At temperature 0 it takes the most likely token. Otherwise it divides logits by the temperature
    and draws from their softmax, among the `top_k` most likely tokens, and of these among the most
    likely ones that together have a probability of `top_p` (Holtzman et al. 2020, "nucleus
    sampling").
    """
    random = np.random.default_rng(seed)

    def choose(logits_V: np.ndarray) -> int:
        if temperature == 0:
            return int(logits_V.argmax())
        scaled_V = logits_V.astype(np.float64) / temperature
        order = np.argsort(-scaled_V, kind="stable") if top_p < 1 or top_k else np.empty(0, int)
        if top_k:
            scaled_V[order[top_k:]] = -np.inf
        if top_p < 1:
            probability = np.exp(scaled_V[order] - scaled_V[order[0]])
            before = np.cumsum(probability) - probability
            is_out = before >= top_p * probability.sum()
            scaled_V[order[1:][is_out[1:]]] = -np.inf
        # The largest of logits plus Gumbel noise is a draw from their softmax.
        return int(np.argmax(scaled_V + random.gumbel(size=scaled_V.shape)))

    return choose


def until_end(tokens: Iterator[int], ends: Set[int], max_tokens: int) -> Iterator[int]:
    """Yields tokens up to one that ends a document, which is left out, and at most so many."""
    return itertools.takewhile(
        lambda token: token not in ends, itertools.islice(tokens, max_tokens)
    )


class Generator:
    """Continues texts with the model on its mesh. All processes must make the same calls."""

    def __init__(self, spec: StageSpec, params: Params) -> None:
        self._spec, self._params = spec, params
        self._config, self._mesh = spec.config, spec.mesh
        self._caches = empty_decode_caches(spec)
        self._part = min(PART, spec.config.model.seq_len)
        self._programs: dict[tuple[int, bool], Compiled] = {}

    def tokens_after(self, prompt: Sequence[int] | np.ndarray, choose: Choose) -> Iterator[int]:
        """Yields the tokens that follow the prompt, without end.

        The model sees at most its last `seq_len` tokens. When the text grows beyond that, the last
        `seq_len / 2` tokens are read again, and it goes on after these.
        """
        seq_len = self._config.model.seq_len
        tokens = list(map(int, prompt))[-seq_len:]
        logits_V = self._read(tokens)
        while True:
            tokens.append(choose(logits_V))
            yield tokens[-1]
            if len(tokens) <= seq_len:
                logits_V = self._next(self._same(tokens[-1:]), len(tokens) - 1, 0)[0, 0]
            else:
                tokens = tokens[-max(seq_len // 2, 1) :]
                logits_V = self._read(tokens)

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Returns the logits `[B, T, V]` after each token, float32. T is at most `seq_len`."""
        num_rows = self._mesh.shape["data"]
        groups = []
        for start in range(0, len(tokens_BT), num_rows):
            rows = tokens_BT[start : start + num_rows]
            padded = np.resize(rows, (num_rows, rows.shape[1]))  # repeats rows if they are too few
            parts = list(self._parts(padded, is_for_all=True))
            groups.append(np.concatenate(parts, axis=1)[: len(rows)])
        return np.concatenate(groups)

    def _read(self, tokens: list[int]) -> np.ndarray:
        """Fills the caches with tokens, from position 0 on; returns the logits after the last."""
        last_V = np.empty(0)
        for logits_B1V in self._parts(self._same(tokens), is_for_all=False):
            last_V = logits_B1V[0, -1]
        return last_V

    def _parts(self, tokens_BT: np.ndarray, is_for_all: bool) -> Iterator[np.ndarray]:
        """Fills the caches with tokens, from position 0 on. Yields, part by part, the logits after
        the part's last token, or after each of its tokens.
        """
        size, num_tokens = self._part, tokens_BT.shape[1]
        for start in range(0, num_tokens, size):
            # The last part may reach beyond the tokens: these places are written again before they
            # are read. It may not reach beyond the caches: then it begins earlier, and some tokens
            # are read twice.
            first = min(start, self._config.model.seq_len - size)
            part = tokens_BT[:, first : first + size]
            padding = ((0, 0), (0, size - part.shape[1]))
            last = min(num_tokens - first, size) - 1
            logits = self._next(np.pad(part, padding), first, last, is_for_all)
            yield logits[:, start - first : last + 1] if is_for_all else logits

    def _next(
        self, tokens_BL: np.ndarray, first: int, index: int, is_for_all: bool = False
    ) -> np.ndarray:
        """Adds tokens to the caches, from position `first` on; returns the logits after one of
        them, or after each.
        """
        program = self._compiled(tokens_BL.shape[1], is_for_all)
        logits_BLV, self._caches = program(
            self._params,
            self._caches,
            put_rows(self._mesh, tokens_BL.astype(np.int32)),
            np.int32(first),
            np.int32(index),
        )
        return np.asarray(jax.device_get(logits_BLV))[..., : self._config.model.vocab_size]

    def _same(self, tokens: list[int]) -> np.ndarray:
        """The tokens as a row for each data shard."""
        return np.tile(np.array(tokens, np.int32), (self._mesh.shape["data"], 1))

    def _compiled(self, num_tokens: int, is_for_all: bool) -> Compiled:
        key = num_tokens, is_for_all
        if key not in self._programs:
            self._programs[key] = compile_checked(
                make_decode(self._spec, is_for_all),
                self._mesh,
                self._params,
                self._caches,
                put_rows(self._mesh, self._same([0] * num_tokens)),
                np.int32(0),
                np.int32(0),
            )
        return self._programs[key]
