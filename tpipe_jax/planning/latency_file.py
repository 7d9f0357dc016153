"""Reads `latency.json`, and refuses what the slicer cannot use."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tpipe_jax.config.fields import MAX_INT
from tpipe_jax.errors import UserError, shown
from tpipe_jax.json_files import is_number, read_json
from tpipe_jax.planning.bounds import MAX_TIMES
from tpipe_jax.planning.latency import (
    DEFERRED,
    Deferral,
    LatencyTable,
    Memory,
    Profile,
    Sample,
)
from tpipe_jax.planning.plan import MAX_SECONDS

MAX_FIGURE = 1e18  # of bytes and seconds, so that sums and products are finite
MAX_SAMPLES = 10_000  # a run times a few dozen, and the fit looks at each pair of shapes


def read_profile(content: dict[str, Any]) -> Profile:
    """Returns the profile from its `dataclasses.asdict`, which may have passed through JSON.

    Raises KeyError, TypeError, ValueError or OverflowError if the content is not a valid profile.
    """
    if not isinstance(content, dict):
        raise TypeError("it is not an object")
    if not isinstance(content.get("key"), dict) or len(content["samples"]) > MAX_SAMPLES:
        raise ValueError(f"it has no key, or more than {MAX_SAMPLES} samples")
    deferral = content.get("deferral")
    profile = Profile(
        **content
        | {
            "samples": tuple(Sample(*sample) for sample in content["samples"]),
            "transfer": tuple(content["transfer"]),
            "stage_seconds": tuple(content.get("stage_seconds", (0.0, 0.0))),
            "memory": Memory(**content["memory"]),
            "deferral": Deferral(*map(tuple, deferral)) if deferral else None,
        }
    )
    counts = [profile.batch_size, profile.seq_len, profile.key_block, profile.tile_tokens]
    counts += [n for sample in profile.samples for n in sample[:2]]
    if not all(type(n) is int and 0 < n <= MAX_INT for n in counts):
        raise ValueError(f"a size is not a positive whole number up to {MAX_INT}")
    _check_samples(profile)
    times = [*profile.transfer, profile.outside_seconds, *dataclasses.astuple(profile.memory)]
    times += profile.stage_seconds
    if not len(profile.transfer) == len(profile.stage_seconds) == 2 or not all(
        is_number(t) and 0 <= t <= MAX_FIGURE for t in times
    ):
        raise ValueError(f"a figure is not between 0 and {MAX_FIGURE:g}")
    pairs = profile.deferral or ()
    if not all(len(pair) == 2 and all(map(is_number, pair)) for pair in pairs) or not all(
        abs(t) <= MAX_SECONDS for pair in pairs for t in pair
    ):
        raise ValueError("what deferred gradients of weights take is not two pairs of numbers")
    profile.models()  # raises where there are too few samples
    return profile


def _check_samples(profile: Profile) -> None:
    """Raises ValueError if a sample is not what one is."""
    for sample in profile.samples:
        times = sample[3:5]
        if not all(is_number(t) and 0 < t <= MAX_SECONDS for t in times):
            raise ValueError("a sample is not a time")
        context, is_test = sample[2], sample[5]
        if type(context) is not int or not 0 <= context <= MAX_INT or type(is_test) is not bool:
            raise ValueError("a sample has no context, or does not say whether it is a test")


def load_table(path: Path) -> LatencyTable:
    """Reads `latency.json`. Raises `UserError` if the slicer cannot use the file."""

    def wrong(what: str) -> UserError:
        return UserError(
            f"{path} is no latency file: {what}. It holds unit_tokens, and seconds as forward and "
            "backward [batch - 1][slice units - 1][context units], null where impossible."
        )

    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise wrong(f"it cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise wrong("it is not an object")
    names = ["forward", "backward", *(DEFERRED if any(key in content for key in DEFERRED) else ())]
    if missing := [key for key in ("unit_tokens", *names) if key not in content]:
        raise wrong(f"it has no {missing[0]}")
    unit = content["unit_tokens"]
    if type(unit) is not int or not 0 < unit <= MAX_INT:
        raise wrong(f"unit_tokens={shown(repr(unit))} is not a positive whole number")
    forward, *others = (_to_array(content[key], key, wrong) for key in names)
    for name, other in zip(names[1:], others, strict=True):
        if forward.shape != other.shape:
            raise wrong(f"forward has the shape {_by(forward.shape)} and {name} {_by(other.shape)}")
        holes = np.argwhere(np.isfinite(forward) != np.isfinite(other))
        if len(holes):
            b, i, j = holes[0].tolist()
            raise wrong(f"only one of forward and {name} has a time at [{b}][{i}][{j}]")
    backward, *deferred = others
    try:
        profile = read_profile(content["profile"]) if content.get("profile") else None
        if profile and profile.seq_len != unit * forward.shape[2]:
            raise ValueError(
                f"it is of {profile.seq_len} tokens and the times of {unit * forward.shape[2]}"
            )
        if profile and profile.batch_size != len(forward):
            raise ValueError(
                f"it is of {profile.batch_size} sequences and the times of {len(forward)}"
            )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise wrong(f"its profile cannot be used ({error!r:.200})") from error
    return LatencyTable(
        unit, forward, backward, profile, (deferred[0], deferred[1]) if deferred else None
    )


def _to_array(lists: Any, name: str, wrong: Any) -> np.ndarray:
    """Returns nested lists as an array, null as infinite; `wrong` makes an error from a message."""
    if not _is_nested(lists):
        raise wrong(f"{name} is not a list of lists of lists")
    sizes = {len(rows) for rows in lists}, {len(row) for rows in lists for row in rows}
    if any(len(size) != 1 or 0 in size for size in sizes):
        raise wrong(f"the lists of {name} differ in length or are empty")
    if len(lists) * len(lists[0]) * len(lists[0][0]) > MAX_TIMES:
        raise wrong(f"{name} has more than the {MAX_TIMES} times that can be planned with")
    values = np.array(
        [[[math.inf if t is None else _time(t) for t in row] for row in rows] for rows in lists],
        float,
    )
    wrong_places = np.argwhere(np.isnan(values))
    if len(wrong_places):
        b, i, j = wrong_places[0].tolist()
        raise wrong(f"{name}[{b}][{i}][{j}]={shown(repr(lists[b][i][j]))} is not a time")
    return values


def _time(value: Any) -> float:
    """Returns a time from a file, or NaN if it is none."""
    is_time = type(value) in (int, float) and 0 <= value <= MAX_SECONDS
    return value if is_time else math.nan


def _is_nested(lists: Any) -> bool:
    return (
        isinstance(lists, list)
        and all(isinstance(rows, list) for rows in lists)
        and all(isinstance(row, list) for rows in lists for row in rows)
        and bool(lists)
    )


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))
