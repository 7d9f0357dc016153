"""Reads `latency.json`, and refuses what the slicer cannot use."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from tpipe_jax.errors import UserError
from tpipe_jax.json_files import read_json
from tpipe_jax.planning.latency import (
    DEFERRED,
    Deferral,
    LatencyTable,
    Memory,
    Profile,
    Sample,
)
from tpipe_jax.planning.plan import MAX_SECONDS


def read_profile(content: dict[str, Any]) -> Profile:
    """Returns the profile from its `dataclasses.asdict`, which may have passed through JSON.

    Raises KeyError, TypeError, ValueError or OverflowError if the content is not a valid profile.
    """
    if not isinstance(content, dict):
        raise TypeError("it is not an object")
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
    if not all(isinstance(n, int) and n > 0 for n in counts):
        raise ValueError("a size is not a positive whole number")
    times = [*profile.transfer, profile.outside_seconds, *dataclasses.astuple(profile.memory)]
    times += profile.stage_seconds
    if not len(profile.transfer) == len(profile.stage_seconds) == 2 or not all(
        0 <= t < math.inf for t in times
    ):
        raise ValueError("a figure is not finite and positive")
    if not all(len(pair) == 2 and all(map(math.isfinite, pair)) for pair in profile.deferral or ()):
        raise ValueError("what deferred gradients of weights take is not two pairs of numbers")
    if not all(0 < t <= MAX_SECONDS for sample in profile.samples for t in sample[3:5]):
        raise ValueError("a sample is not a time")
    profile.models()  # raises where there are too few samples
    return profile


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
    if not isinstance(unit, int) or isinstance(unit, bool) or unit < 1:
        raise wrong(f"unit_tokens={unit!r} is not a positive whole number")
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
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise wrong(f"its profile cannot be used ({error!r})") from error
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
    for b, rows in enumerate(lists):
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                if value is None:
                    continue
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if not is_number or not 0 <= value <= MAX_SECONDS:
                    raise wrong(f"{name}[{b}][{i}][{j}]={value!r} is not a time")
    return np.array(
        [[[math.inf if t is None else t for t in row] for row in rows] for rows in lists], float
    )


def _is_nested(lists: Any) -> bool:
    return (
        isinstance(lists, list)
        and all(isinstance(rows, list) for rows in lists)
        and all(isinstance(row, list) for rows in lists for row in rows)
        and bool(lists)
    )


def _by(shape: Iterable[int]) -> str:
    return " x ".join(map(str, shape))
