"""Predicts the seconds and bytes that a plan takes, from the times of slices. No jax."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tpipe_jax.config.settings import ScheduleName
from tpipe_jax.errors import UserError
from tpipe_jax.planning.bounds import MAX_CELLS, check_times
from tpipe_jax.planning.latency import LatencyTable, Memory
from tpipe_jax.planning.placement import chunk_factors
from tpipe_jax.planning.plan import Nested, Plan, PlanRequest, Prediction
from tpipe_jax.planning.schedule import make_schedule, slice_order
from tpipe_jax.planning.simulate import Timeline, simulate
from tpipe_jax.planning.slicer import Slicing


@dataclass(frozen=True)
class Estimator:
    """The times of all slices that a request allows, and what they predict for plans."""

    table: LatencyTable
    request: PlanRequest
    stage_factors: tuple[float, ...]
    cuts: np.ndarray
    """Where a sequence may be cut, in tokens."""
    forward: np.ndarray
    """Seconds `[b - 1, stop, start]` of b sequences between two cuts; infinite if not allowed."""
    backward: np.ndarray
    deferred: tuple[np.ndarray, np.ndarray] | None = None
    """Backward passes without gradients of weights, and these gradients; None if not known."""

    @classmethod
    def of(
        cls, table: LatencyTable, request: PlanRequest, stage_factors: Sequence[float]
    ) -> "Estimator":
        """Raises `UserError` if the table's unit does not divide the sequence, or if token slices
        are given and the table has no profile.
        """
        cuts, (forward, backward, *deferred) = _times(table, request)
        known = (deferred[0], deferred[1]) if deferred else None
        return cls(table, request, tuple(stage_factors), cuts, forward, backward, known)

    @property
    def times(self) -> tuple[np.ndarray, np.ndarray]:
        return self.forward, self.backward

    @property
    def slice_tokens(self) -> np.ndarray:
        """Tokens of each slice, `[b - 1, stop, start]`."""
        sizes = np.arange(1, len(self.forward) + 1)[:, None, None]
        return sizes * (self.cuts[None, :, None] - self.cuts[None, None, :])

    def chunk_factors(self, num_chunks: int) -> list[float]:
        """Returns the time of each chunk of each stage, divided by the times in the table: chunk c
        of stage s is at c P + s.
        """
        layers, P = self.request.num_layers, self.request.num_stages
        if num_chunks == 1 or layers is None:
            return [factor / num_chunks for factor in self.stage_factors] * num_chunks
        shares = np.reshape(chunk_factors(layers, P, num_chunks), (num_chunks, P))
        return (shares / shares.sum(0) * self.stage_factors).ravel().tolist()

    def without(self, is_left_out: np.ndarray) -> "Estimator":
        """Returns the estimator with some slices not allowed."""
        forward, backward = (np.where(is_left_out, np.inf, t) for t in self.times)
        return replace(self, forward=forward, backward=backward)

    def plan_of(self, slicing: Slicing, schedule: ScheduleName, num_chunks: int = 1) -> Plan:
        """Returns a slicing as a plan in tokens, with the predicted times of slices and step."""
        token_slices = tuple(tuple(np.diff(self.cuts[list(own)]).tolist()) for own in slicing.cuts)
        slices = slicing.batch_slices, token_slices
        plan = Plan(self.request.num_stages, *slices, schedule=schedule, num_chunks=num_chunks)
        backward, weights = self.backward, None
        if schedule == "1f1b-deferred":
            assert self.deferred
            backward, weights = self.deferred
        transfer = [
            [self._transfer_seconds(b * n) for n in own]
            for b, own in zip(plan.batch_slices, token_slices, strict=True)
        ]
        prediction = Prediction(
            step_seconds=slicing.seconds + self.outside_seconds,
            outside_seconds=self.outside_seconds,
            slice_forward_seconds=_of_slices(slicing, self.forward),
            slice_backward_seconds=_of_slices(slicing, backward),
            slice_weight_seconds=None if weights is None else _of_slices(slicing, weights),
            slice_transfer_seconds=tuple(map(tuple, transfer)),
            is_optimal=False,
            lower_bound_seconds=0.0,
        )
        plan = replace(plan, prediction=prediction)
        if schedule == "terapipe" and min(self.stage_factors) == max(self.stage_factors):
            return plan  # the slicer's formula is exact for equal stages
        seconds = predicted_timeline(plan, self.chunk_factors(num_chunks)).step_seconds
        seconds += self.outside_seconds
        return replace(plan, prediction=replace(prediction, step_seconds=seconds))

    @property
    def outside_seconds(self) -> float:
        """Seconds of a step outside its slices; 0 unless measured for the same batch."""
        profile, request = self.table.profile, self.request
        if profile is None:
            return 0.0
        is_same = (profile.batch_size, profile.seq_len) == (request.batch_size, request.seq_len)
        return profile.outside_seconds if is_same else 0.0

    def _transfer_seconds(self, num_tokens: int) -> float:
        """Returns the seconds to hand on a slice of `num_tokens` tokens."""
        profile = self.table.profile
        return profile.transfer[0] + profile.transfer[1] * num_tokens if profile else 0.0

    @property
    def memory(self) -> Memory:
        """The measured memory. Raises `UserError` if it was not measured with the times."""
        if self.table.profile is None:
            raise UserError(
                "the latencies come without the memory that was measured with them, so a limit "
                "cannot be kept: leave it out, or plan from a config."
            )
        return self.table.profile.memory

    def activation_bytes(self, plan: Plan) -> float | None:
        """Returns the bytes that a stage stores for sequences in the pipeline; None if unknown."""
        schedule, profile = make_schedule(plan), self.table.profile
        if profile is None:
            return None
        b, n = schedule.longest_shape
        return profile.memory.activation_bytes(
            schedule.num_rows * plan.seq_len,
            schedule.num_gradient_rows * plan.seq_len,
            schedule.num_slots * b * n,
        )

    def least_activation_bytes(
        self, batch_slices: tuple[int, ...], schedule: ScheduleName
    ) -> float:
        """Returns `activation_bytes` with the shortest slices; no others need less. Of many slices,
        only the first count. Raises `UserError` if it is not known.
        """
        _ = self.memory  # raises where it is not known
        shortest = tuple(np.diff(self.cuts).tolist())
        if schedule in ("1f1b", "1f1b-deferred"):  # others keep all sequences
            cells = len(shortest) * self.request.num_stages
            batch_slices = batch_slices[: max(2, MAX_CELLS // cells)]
        else:
            shortest = (self.request.seq_len,)
        slices = batch_slices, (shortest,) * len(batch_slices)
        plan = Plan(self.request.num_stages, *slices, schedule=schedule)
        return self.activation_bytes(plan) or 0.0

    def step_bytes(self, plan: Plan) -> float:
        """Returns the bytes of a step on a device. Raises `UserError` if they are not known."""
        memory, activation_bytes = self.memory, self.activation_bytes(plan)
        assert activation_bytes is not None
        return memory.step_bytes(activation_bytes, max(b * n for b, n in plan.shapes))


def predicted_timeline(plan: Plan, chunk_factors: Sequence[float]) -> Timeline:
    """Simulates the pipeline's part of a step, from the predicted times in the plan."""
    prediction, schedule = plan.prediction, make_schedule(plan)
    assert prediction is not None
    order = slice_order(schedule, plan)

    def of_items(nested: Nested) -> list[float]:
        return [nested[m][n] for m, n in order]

    transfer, weights = of_items(prediction.slice_transfer_seconds), prediction.slice_weight_seconds
    forward, backward = (
        [t - x for t, x in zip(of_items(times), transfer, strict=True)]
        for times in (prediction.slice_forward_seconds, prediction.slice_backward_seconds)
    )
    return simulate(
        schedule,
        forward,
        backward,
        weight_seconds=None if weights is None else of_items(weights),
        chunk_factors=chunk_factors,
        transfer_seconds=transfer,
    )


def _times(table: LatencyTable, request: PlanRequest) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns where a sequence may be cut, in tokens, and seconds `[b - 1, stop, start]` between
    the cuts, as in `LatencyTable.arrays`. Raises `UserError` if the table has no such times.
    """
    if request.token_slices is not None:
        if table.profile is None:
            raise UserError(
                "token slices that are given have no times in latencies without a profile, whose "
                "slices are whole units: leave token_slices at auto, or take latencies that were "
                "measured."
            )
        cuts = np.cumsum([0, *request.token_slices])
        b = np.arange(1, request.batch_size + 1)[:, None]
        num_tokens, start = np.diff(cuts), cuts[:-1]
        check_times(
            "plan.token_slices",
            *(request.batch_size, len(num_tokens), "give fewer token slices"),
        )
        times = table.profile.slice_seconds(b, num_tokens, start)
        deferred = table.profile.without_weights(times[1], b, num_tokens) or ()
        return cuts, [_between_neighbours(t) for t in (*times, *deferred)]
    num_units, rest = divmod(request.seq_len, table.unit_tokens)
    if rest:
        raise UserError(
            f"a sequence of {request.seq_len} tokens is not a multiple of the unit of the "
            f"latencies, {table.unit_tokens} tokens: plan for another length, or measure another "
            "unit."
        )
    check_times(
        f"a sequence of {request.seq_len} tokens, in units of {table.unit_tokens} tokens,",
        *(len(table.forward), num_units),
        "plan for shorter sequences, or with latencies of a longer unit",
    )
    return np.arange(num_units + 1) * table.unit_tokens, table.by_cuts(num_units)


def _between_neighbours(times: np.ndarray) -> np.ndarray:
    """Returns seconds `[b - 1, stop, start]` where each slice ends at the next cut, from those of
    the slices, `[b - 1, slice]`.
    """
    num_rows, num_slices = times.shape
    full = np.full((num_rows, num_slices + 1, num_slices + 1), np.inf)
    full[:, np.arange(1, num_slices + 1), np.arange(num_slices)] = times
    return full


def _of_slices(slicing: Slicing, times: np.ndarray) -> Nested:
    """Returns the times of the slices of a slicing."""
    return tuple(
        tuple(float(times[b - 1, stop, start]) for start, stop in itertools.pairwise(own))
        for b, own in zip(slicing.batch_slices, slicing.cuts, strict=True)
    )
