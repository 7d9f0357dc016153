"""Batches of training and held-out sequences, made of the tokens of `sources`.

Only the sequences that are asked for are read. A sequence is a window of the tokens, or as many
whole documents as fit. Where the settings mark documents, a row says which document each token
belongs to.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import grain
import numpy as np

from tpipe_jax.config.settings import IGNORE, Config
from tpipe_jax.data.packing import Span, best_fit
from tpipe_jax.data.sources import Share, TokenSource, open_shares
from tpipe_jax.errors import UserError


@dataclass(frozen=True)
class _Windows:
    """Sequence i is one span: tokens `[i*T, i*T + T + 1)`, counted from the first position."""

    positions: range
    seq_len: int
    is_whole: bool
    """Whether a shorter sequence at the end is left out."""

    def __len__(self) -> int:
        num_targets = max(len(self.positions) - 1, 0)
        return num_targets // self.seq_len if self.is_whole else -(-num_targets // self.seq_len)

    def __getitem__(self, index: int) -> list[Span]:
        start = self.positions.start + range(len(self))[index] * self.seq_len
        return [(start, min(start + self.seq_len + 1, self.positions.stop))]


@dataclass(frozen=True)
class Sequences:
    """A data source for grain: sequence i is made of `pieces[i]` of a token source."""

    config: Config
    source: TokenSource
    pieces: list[list[Span]] | _Windows

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> np.ndarray:
        return make_row(self.config, self.source, self.pieces[index])


class Batches:
    """Batches of sequences, shuffled anew in each epoch or, without a seed, in the data's order.

    Batch i holds `batch_size` sequences of an endless stream, from number i * batch_size on, unless
    it `begins` elsewhere. It depends on nothing but the seed and this number. So it is the same in
    every process, and a resumed run has to know only how many sequences it has read.
    """

    def __init__(
        self,
        config: Config,
        shares: Sequence[Share],
        sequences: Sequence[Sequences],
        shuffle_seed: int | None,
    ) -> None:
        self.num_tokens = sum(len(share.positions) for share in shares)
        self.formats = sorted({name for share in shares for name in share.source.formats})
        self.notes = [note for share in shares for note in share.source.notes]
        """Lines on what was skipped or left out."""
        self.config = config
        """The settings, in which config.data.packing is no longer auto."""

        self._begin = 0, 0

        def endless(own: Sequences) -> grain.MapDataset:
            dataset = grain.MapDataset.source(own)
            if shuffle_seed is not None:
                # Not shuffle(seed=...): with it, epoch 1 of seed 0 would be epoch 0 of seed 1.
                dataset = dataset.seed(shuffle_seed).shuffle()
            return dataset.repeat()

        mixed, weights = list(map(endless, sequences)), [share.weight for share in shares]
        self._sequences = grain.MapDataset.mix(mixed, weights) if len(mixed) > 1 else mixed[0]

    def begin(self, step: int, sequences: int) -> None:
        """Lets batch `step` begin with sequence number `sequences`: batches before it may have had
        another size.
        """
        self._begin = step, sequences

    def sequences_before(self, step: int) -> int:
        """Returns the number of the sequence with which batch `step` begins."""
        first, sequences = self._begin
        return sequences + (step - first) * self.config.train.batch_size

    def batch(self, index: int, rows: slice = slice(None)) -> np.ndarray:
        """Rows of batch `index`, as `make_row` makes them, `[rows, ...]`.

        Reads these rows only. Raises `UserError` if a token id lies outside the vocabulary.
        """
        numbers = range(self.sequences_before(index), self.sequences_before(index + 1))[rows]
        # Any, since grain returns None for what is filtered out; here no sequence is filtered out.
        sequences: list[Any] = [self._sequences[number] for number in numbers]
        return np.stack(sequences)


def open_data(config: Config) -> tuple[Batches, Batches]:
    """Returns batches to train on, shuffled by config.train.seed, and held-out ones, in data order.

    Held-out tokens come from config.data.eval. If it is None or names the same files as
    config.data.train, they are the last part of config.data.train. No held-out token is trained on.
    Raises `UserError` for data that it cannot use.
    """
    train, held_out = _shares(config)
    uses = "to train on", "held out"
    if train[0].source is held_out[0].source:
        by = f"by config.data.held_out={config.data.held_out}"
        uses = f"left to train on {by}", f"held out {by}"
    config = with_packing(config, [*train, *held_out])
    return (
        _batches(config, train, uses[0], config.train.seed),
        _batches(config, held_out, uses[1], None),
    )


def open_held_out(config: Config) -> tuple[Config, list[Share]]:
    """Returns the config with packing resolved, as by `with_packing` for all data, and the shares
    of the data that are held out.

    Raises `UserError` as `open_data` does.
    """
    train, held_out = _shares(config)
    return with_packing(config, [*train, *held_out]), held_out


def with_packing(config: Config, shares: Sequence[Share]) -> Config:
    """Returns the config with config.data.packing as cut or whole: auto is resolved for these
    sources.

    Raises `UserError` if packing is cut and a source has prompts, or if the config marks documents
    and a source does not say where they begin.
    """
    packing, sources = config.data.packing, [share.source for share in shares]
    prompts = [source for source in sources if source.has_prompts]
    if packing == "cut" and prompts:
        raise UserError(
            f"config.data.packing=cut would part the prompts of {prompts[0].setting} from what "
            "follows them: set it to whole, or auto."
        )
    if packing == "auto":
        packing = "whole" if prompts else "cut"
    config = replace(config, data=replace(config.data, packing=packing))
    if config.data.marks_documents:
        for source in sources:
            source.check_documents()
    return config


def make_sequences(config: Config, share: Share, is_whole: bool = True) -> Sequences:
    """Returns the sequences of a share of a source. If windows are cut and `is_whole` is set, a
    shorter sequence at the end is left out. Raises `UserError` for documents that do not fit.
    """
    source, positions, _ = share
    if config.data.packing == "whole":
        pieces = best_fit(_pieces(config, source, positions), config.model.seq_len + 1)
    else:
        pieces = _Windows(positions, config.model.seq_len, is_whole)
    return Sequences(config, source, pieces)


def make_row(config: Config, source: TokenSource, pieces: Sequence[Span]) -> np.ndarray:
    """Returns a sequence made of these pieces of a source: a row as in `data.rows.RowLayout`."""
    size = config.model.seq_len + 1
    if not config.data.marks_documents:
        [(start, stop)] = pieces
        return np.pad(source.read(start, stop), (0, size - stop + start), constant_values=IGNORE)
    tokens, is_target = np.zeros(size, np.int32), np.zeros(size, bool)
    starts = np.arange(size, dtype=np.int32)  # a token of padding is its own document
    at = 0
    for start, stop in pieces:
        own = slice(at, at + stop - start)
        tokens[own], is_target[own] = source.read(start, stop), source.is_learnt(start, stop)
        begins = source.begins(start, tokens[own])
        # A piece that continues a document begins with a token that was a target before.
        is_target[at] &= begins[0]
        begins[0] = True
        starts[own] = np.maximum.accumulate(np.where(begins, starts[own], 0))
        at = own.stop
    if not config.data.cross_document_attention:
        is_target &= starts < np.arange(size)  # a document's first token has no input before it
    return np.stack([tokens[:-1], np.where(is_target, tokens, IGNORE)[1:], starts[:-1]])


def _pieces(config: Config, source: TokenSource, positions: range) -> list[Span]:
    """Returns the documents that begin at these positions. A document too long for one sequence
    becomes several pieces; each piece begins with the last token of the piece before it.

    A document with a prompt is kept whole: if it is too long, config.data.long_prompts says what
    becomes of it, and a line is added to the notes of the source. Raises `UserError` if it is to be
    refused.
    """
    seq_len, starts = config.model.seq_len, source.document_starts
    bounds = np.append(starts, len(source))
    low, high = np.searchsorted(starts, (positions.start, positions.stop))
    pieces: list[Span] = []
    changed: Counter[str] = Counter()
    for start, stop in zip(bounds[low:high].tolist(), bounds[low + 1 :].tolist(), strict=False):
        if stop - start > seq_len + 1 and not (learnt := source.is_learnt(start, stop)).all():
            if config.data.long_prompts == "refuse":
                raise UserError(
                    f"{source.setting} has a prompt and completion of {stop - start} tokens, more "
                    f"than config.model.seq_len={seq_len} and one: raise that, shorten them, or "
                    "set config.data.long_prompts to skip or truncate."
                )
            # Nothing would be learnt of a prompt that fills the sequence.
            is_cut = config.data.long_prompts == "truncate" and learnt[: seq_len + 1].any()
            changed["truncated" if is_cut else "skipped"] += 1
            if is_cut:
                pieces.append((start, start + seq_len + 1))
            continue
        for first in range(start, stop - 1, seq_len):
            pieces.append((first, min(first + seq_len + 1, stop)))
    for what, number in sorted(changed.items()):
        source.notes.append(
            f"{source.setting}: {number:,} with a prompt {what}, longer than "
            f"config.model.seq_len={seq_len}"
        )
    return pieces


def _shares(config: Config) -> tuple[list[Share], list[Share]]:
    """Returns the shares to train on, and the held-out shares."""
    data, vocab_size = config.data, config.model.vocab_size
    train = held_out = open_shares("config.data.train", data.train, vocab_size, data)
    if data.eval is not None:
        name = "config.data.eval"
        held_out = open_shares(name, data.eval, vocab_size, data, is_held_out=True)
    elif any(share.source.held_out for share in train):
        return _by_name(train, data.held_out)
    files, others = (
        {name for share in shares for name in share.source.files} for shares in (train, held_out)
    )
    if files == others:
        splits = [len(own) - int(data.held_out * len(own)) for own, _, _ in train]
        pairs = list(zip(splits, train, strict=True))
        return (
            [Share(own, range(n), weight) for n, (own, _, weight) in pairs],
            [Share(own, range(n, len(own)), weight) for n, (own, _, weight) in pairs],
        )
    if shared := files & others:
        raise UserError(
            f"config.data.eval={data.eval} holds {min(shared)}, and so does "
            f"config.data.train={data.train}: keep their files apart, or leave out "
            "config.data.eval to hold out the end of config.data.train."
        )
    return train, held_out


def _by_name(shares: list[Share], fraction: float) -> tuple[list[Share], list[Share]]:
    """Returns shares to train on, and held-out ones: the files that are named so, or else the last
    part of a source.
    """
    train, held_out = [], []
    for source, positions, weight in shares:
        split = len(positions)
        if apart := source.held_out:
            held_out.append(Share(apart, range(len(apart)), weight))
        else:
            split -= int(fraction * split)
            held_out.append(Share(source, range(split, len(positions)), weight))
        train.append(Share(source, range(split), weight))
    return train, held_out


def _batches(
    config: Config, shares: Sequence[Share], use: str, shuffle_seed: int | None
) -> Batches:
    seq_len, all_sequences = config.model.seq_len, []
    for share in shares:
        source, positions, _ = share
        sequences = make_sequences(config, share)
        if not len(sequences) and config.data.packing == "whole":
            raise UserError(
                f"{source.setting} has {len(positions)} tokens {use}, in which no document of two "
                "or more begins: raise config.data.held_out, or name config.data.eval."
            )
        if not len(sequences):
            raise UserError(
                f"{source.setting} has {len(source)} tokens, {len(positions)} of them {use}, but "
                f"one sequence of config.model.seq_len={seq_len} takes {seq_len + 1}: "
                "give longer data or lower config.model.seq_len."
            )
        all_sequences.append(sequences)
    return Batches(config, shares, all_sequences, shuffle_seed)
