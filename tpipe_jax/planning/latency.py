"""The latency model: how long a stage takes for any slice, from the few slices that were timed.

Equation 9 of Li et al. 2021, for b sequences at once and for each direction on its own:

    t(b, i, j) = t(b, i, 0) + a0 + (a1 i + a2 j + a3 i j) b      for i tokens after j > 0 others

The terms after t(b, i, 0) are fitted by least squares of the relative error. Attention reads its
context in whole blocks, so j is the number of context tokens that it reads (`context_blocks`).

t(b, i, 0) is interpolated between measured slices, without what the slice's own keys cost, which
grows with the square of its length: i tokens attend to i / 2 of their own on average, so that is
a3 b i^2 / 2. The rest is nearly a straight line. A GPU computes products in tiles of many tokens,
so there i counts as whole tiles.

Other modules get two forms of the times. A `Profile` holds what was measured. A `LatencyTable`
holds the time of every slice in whole units: it is all that the slicer needs, and `latency.json`
stores it.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tpipe_jax.planning.bounds import check_times
from tpipe_jax.planning.context_blocks import context_read

DEFERRED = "backward_inputs", "backward_weights"  # names in the file of the times under deferral


class Sample(NamedTuple):
    """The measured times of a stage for one slice."""

    num_rows: int
    num_tokens: int
    context: int
    forward_seconds: float
    backward_seconds: float
    is_test: bool
    """Whether the sample is kept out of the fit, to measure the error of the fit."""


class LatencyModel:
    """Predicts the time of any slice in one direction, forward or backward."""

    def __init__(
        self, samples: Sequence[Sample], direction: str, key_block: int, tile_tokens: int = 1
    ) -> None:
        self._key_block, self._tile_tokens = key_block, tile_tokens
        fitted, self._tests = (
            np.array(
                [
                    (*s[:3], getattr(s, f"{direction}_seconds"))
                    for s in samples
                    if s.is_test == is_test
                ]
            ).reshape(-1, 4)
            for is_test in (False, True)
        )
        bare = fitted[fitted[:, 2] == 0]
        bare[:, 1] = self._in_tiles(bare[:, 0], bare[:, 1])
        self._per_pair = 0.0  # exact for the slices of the fit, which are measured without context
        self._sizes, self._lengths, self._grid = _interpolation_grid(bare)
        b, i, j, seconds = fitted[fitted[:, 2] > 0].T
        features = np.stack(self._features(b, i, j), -1) / seconds[:, None]
        target = 1 - self._without_context(b, i) / seconds
        self._coefficients = np.linalg.lstsq(features, target)[0]
        self._per_pair = min(max(float(self._coefficients[3]), 0.0), _most_per_pair(bare))
        bare[:, 3] -= self._own_keys(bare[:, 0], bare[:, 1])
        self._sizes, self._lengths, self._grid = _interpolation_grid(bare)

    def predict(self, num_rows: Any, num_tokens: Any, context: Any) -> np.ndarray:
        """Returns the seconds of slices: `num_rows` sequences by `num_tokens` tokens, after
        `context` tokens.
        """
        b, i, j = map(np.asarray, (num_rows, num_tokens, context))
        products = zip(self._coefficients, self._features(b, i, j), strict=True)
        term = sum(coefficient * feature for coefficient, feature in products)
        return self._without_context(b, i) + np.where(j > 0, np.maximum(term, 0), 0)

    def relative_errors(self) -> np.ndarray:
        """Returns prediction / measurement - 1 for each sample that is kept out of the fit."""
        b, i, j, seconds = self._tests.T
        return self.predict(b, i, j) / seconds - 1

    def _features(self, b: np.ndarray, i: np.ndarray, j: np.ndarray) -> list[np.ndarray]:
        read = context_read(i, j, self._key_block)
        return [np.ones_like(read), b * i, b * read, b * i * read]

    def _without_context(self, b: np.ndarray, i: np.ndarray) -> np.ndarray:
        """Returns t(b, i, 0): bilinear in the grid, constant below its shortest slice, and linear
        beyond its longest, to which the slice's own keys are added.
        """
        i = self._in_tiles(b, i)
        b_low, b_high, b_share = _bracket(self._sizes, b)
        i_low, i_high, i_share = _bracket(self._lengths, i)
        low, high = (
            self._grid[size, i_low] * (1 - i_share) + self._grid[size, i_high] * i_share
            for size in (b_low, b_high)
        )
        return low * (1 - b_share) + high * b_share + self._own_keys(b, i)

    def _own_keys(self, b: np.ndarray, i: np.ndarray) -> np.ndarray:
        """Returns the seconds for the keys of the slice itself."""
        return self._per_pair * b * i * i / 2

    def _in_tiles(self, b: np.ndarray, i: np.ndarray) -> np.ndarray:
        """Returns the lengths of slices whose tokens count as whole tiles."""
        return -(-b * i // self._tile_tokens) * self._tile_tokens / b


def _interpolation_grid(bare: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns numbers of sequences, lengths, and seconds `[sequences, lengths]` without context.

    One sequence is measured at many lengths, and several sequences at fewer lengths. In between,
    the extra seconds per token that several sequences take over one are interpolated, since these
    change little with the length. Their ratio to the time of one sequence would be no use: most of
    the time of a short slice is a constant.
    """
    rows = {b: _by_length(bare[bare[:, 0] == b]) for b in np.unique(bare[:, 0])}
    lengths = np.unique(bare[:, 1])
    one = np.interp(lengths, *rows[1])
    grid = []
    for own, seconds in rows.values():
        per_token = (seconds - np.interp(own, *rows[1])) / own
        grid.append(one + lengths * np.interp(np.log(lengths), np.log(own), per_token))
    return np.array(list(rows)), lengths, np.stack(grid)


def _most_per_pair(bare: np.ndarray) -> float:
    """Returns the most that a token may cost another one of its slice, if what is left of the time
    of a slice is to grow with its length.
    """
    bounds = [math.inf]
    for b in np.unique(bare[:, 0]):
        lengths, seconds = _by_length(bare[bare[:, 0] == b])
        bounds.extend(2 * np.diff(seconds) / np.diff(lengths**2) / b)
    return max(0.0, min(bounds))


def _by_length(bare: np.ndarray) -> np.ndarray:
    """Returns lengths, ascending, and the mean seconds of the samples of each length."""
    lengths, where, counts = np.unique(bare[:, 1], return_inverse=True, return_counts=True)
    return np.stack([lengths, np.bincount(where, bare[:, 3]) / counts])


def _bracket(points: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the indices of the points below and above x, and where x lies between: 0 to 1, or
    more beyond the last point.
    """
    high = np.clip(np.searchsorted(points, x), 0, len(points) - 1)
    low = np.maximum(high - 1, 0)
    span = np.where(high > low, points[high] - points[low], 1)
    return low, high, np.maximum((x - points[low]) / span, 0)


@dataclass(frozen=True)
class Memory:
    """The memory that a step needs on a device."""

    fixed_bytes: int
    """Parameters, gradients, optimiser state and loss."""
    saved_bytes_per_token: int
    """What the forward pass stores for the backward pass, and the stage's input or output."""
    working_bytes_per_token: int
    """What a stage needs while it works on a slice."""
    gathered_bytes_per_token: int = 0
    """What backward passes collect for the earlier tokens of the sequence: gradients of keys and
    values. Older files count it in `saved_bytes_per_token`."""
    deferred_bytes_per_token: int = 0
    """What a stage stores of a slice until it computes deferred gradients of weights."""

    def activation_bytes(
        self, saved_tokens: int, gathered_tokens: int, deferred_tokens: int = 0
    ) -> float:
        """Returns the bytes stored for sequences and slices, from their numbers of tokens."""
        return (
            self.saved_bytes_per_token * saved_tokens
            + self.gathered_bytes_per_token * gathered_tokens
            + self.deferred_bytes_per_token * deferred_tokens
        )

    def step_bytes(self, activation_bytes: float, slice_tokens: Any) -> Any:
        """Returns the bytes of a step; `slice_tokens` are the tokens of its largest slice."""
        return self.fixed_bytes + activation_bytes + self.working_bytes_per_token * slice_tokens


class Deferral(NamedTuple):
    """How deferred gradients of weights change the times of a stage, in seconds.

    Each field has a constant, and the seconds for each token of the slice.
    """

    weights: tuple[float, float]
    """Time of the deferred gradients of weights."""
    saved: tuple[float, float]
    """Time that the backward pass saves by leaving these gradients out."""


@dataclass(frozen=True)
class Profile:
    """All measurements of a model on a mesh."""

    batch_size: int
    """Sequences of a data shard."""
    seq_len: int
    key_block: int
    samples: tuple[Sample, ...]
    transfer: tuple[float, float]
    """Seconds of a tick without work: a constant, and the seconds for each token of the slice."""
    outside_seconds: float
    """Seconds of a step without its slices: embedding, head, loss and optimiser."""
    memory: Memory
    key: dict[str, Any]
    """Settings, devices and versions that the measurements depend on."""
    deferral: Deferral | None = None
    """None where it was not measured."""
    tile_tokens: int = 1
    """Tokens of a tile of the products of a GPU, which computes whole tiles; 1 elsewhere."""
    stage_seconds: tuple[float, float] = (0.0, 0.0)
    """What a stage takes for a slice besides its layers, in either direction, as a part of the
    samples: a constant, and the seconds for each token of the slice."""

    def models(self) -> tuple[LatencyModel, LatencyModel]:
        """Returns the fitted models, forward and backward; they leave the transfer out."""
        forward, backward = (
            LatencyModel(self.samples, direction, self.key_block, self.tile_tokens)
            for direction in ("forward", "backward")
        )
        return forward, backward

    def slice_seconds(
        self, num_rows: Any, num_tokens: Any, context: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns how long a slice occupies a stage, forward and backward: work and transfer."""
        transfer = self.transfer[0] + self.transfer[1] * np.multiply(num_rows, num_tokens)
        forward, backward = (
            model.predict(num_rows, num_tokens, context) + transfer for model in self.models()
        )
        return forward, backward

    def without_weights(
        self, backward_seconds: np.ndarray, num_rows: Any, num_tokens: Any
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Replaces backward seconds by two: of the pass without gradients of weights, and of these
        gradients alone. The two need not add up to the time before. None if deferral was not
        measured.
        """
        if self.deferral is None:
            return None
        size = np.multiply(num_rows, num_tokens)
        weights, saved = (constant + per_token * size for constant, per_token in self.deferral)
        # A pass without these gradients still has its transfer.
        least = self.transfer[0] + self.transfer[1] * size
        inputs = np.maximum(backward_seconds - saved, least)
        return inputs, np.broadcast_to(np.maximum(weights, 0), inputs.shape)

    def table(self, unit_tokens: int) -> "LatencyTable":
        """Returns the times of all slices in whole units."""
        num_units = self.seq_len // unit_tokens
        check_times(
            f"a sequence of {self.seq_len} tokens in units of {unit_tokens}",
            *(self.batch_size, num_units, "set a larger config.plan.unit_tokens"),
        )
        b = np.arange(1, self.batch_size + 1)[:, None, None]
        i = np.arange(1, num_units + 1)[None, :, None]
        j = np.arange(num_units)[None, None, :]
        times = self.slice_seconds(b, i * unit_tokens, j * unit_tokens)
        deferred = self.without_weights(times[1], b, i * unit_tokens)
        forward, backward, *deferred = (
            np.where(i + j <= num_units, t, np.inf) for t in (*times, *(deferred or ()))
        )
        return LatencyTable(
            unit_tokens, forward, backward, self, (deferred[0], deferred[1]) if deferred else None
        )


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of every slice, `[b - 1, slice units - 1, context units]`, infinite if impossible."""

    unit_tokens: int
    forward: np.ndarray
    backward: np.ndarray
    profile: Profile | None = None
    """The measurements behind the times; None if there are none."""
    deferred: tuple[np.ndarray, np.ndarray] | None = None
    """Seconds of backward passes without gradients of weights, and of these gradients; None where
    they are not known."""

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All times, by their names in `latency.json`."""
        deferred = dict(zip(DEFERRED, self.deferred or (), strict=False))
        return {"forward": self.forward, "backward": self.backward} | deferred

    def by_cuts(self, num_units: int) -> list[np.ndarray]:
        """Returns all times as `[b - 1, stop, start]`, the form that the slicer takes."""
        stop, start = np.arange(num_units + 1)[:, None], np.arange(num_units + 1)[None, :]
        _, num_slices, num_contexts = self.forward.shape
        known = (stop > start) & (stop - start <= num_slices) & (start < num_contexts)
        i, j = np.where(known, stop - start - 1, 0), np.where(known, start, 0)
        return [np.where(known, t[:, i, j], np.inf) for t in self.arrays.values()]

    def save(self, path: Path) -> None:
        """Writes `latency.json`, complete or not at all."""
        content: dict[str, Any] = {"unit_tokens": self.unit_tokens}
        content |= {name: _to_lists(times) for name, times in self.arrays.items()}
        if self.profile:
            content["profile"] = dataclasses.asdict(self.profile)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
        partial.replace(path)


def _to_lists(times: np.ndarray) -> list[list[list[float | None]]]:
    return [
        [[float(f"{t:.9g}") if math.isfinite(t) else None for t in row] for row in rows]
        for rows in times.tolist()
    ]
