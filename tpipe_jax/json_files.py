"""Reads JSON that somebody else may have written, within bounds of size and depth. No jax."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from tpipe_jax.errors import shown

MAX_BYTES = 2**28  # of a text, 256 MiB: many times the latencies of a long sequence
# A short list takes 30 times the memory of its text, so 2 GiB at most. Latencies have 2^24 numbers.
MAX_VALUES = 2**24 + 2**20
MAX_DEPTH = 100  # of lists and objects in each other; what this package writes has fewer than 10
_DIGITS = "it has a number of thousands of digits"
_TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep"


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file. Raises OSError if the file cannot be read, and ValueError
    as `parse_json` does.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except MemoryError:
        raise ValueError("it does not fit into memory") from None
    return parse_json(content)


def parse_json(text: str | bytes) -> Any:
    """Returns the value that a JSON text holds. Bytes are UTF-8, with or without its mark in front.

    Raises ValueError if the text is no JSON, gives a name in an object twice, has more than
    `MAX_BYTES` or `MAX_VALUES`, or is nested more than `MAX_DEPTH` deep. The message is a part of a
    sentence about "it", the text.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        # Each value but the first comes after one of these, so this is told before the work.
        if len(text) > MAX_VALUES and sum(map(text.count, ",[{")) > MAX_VALUES:
            raise _Unfit(f"it has more than {MAX_VALUES >> 20} million values")
        value = json.loads(text, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"its byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        reason = error.msg[:1].lower() + error.msg[1:]
        where = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"it is no JSON, {reason} at {where}") from None
    except _Unfit as error:
        raise ValueError(str(error)) from None
    except ValueError:
        raise ValueError(_DIGITS) from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except MemoryError:
        raise ValueError("it does not fit into memory") from None
    # Only a text of many brackets can be deep, so most are not searched.
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_deep(value):
        raise ValueError(_TOO_DEEP)
    return value


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number. True and false are none."""
    return type(value) is int or (type(value) is float and math.isfinite(value))


class _Unfit(ValueError):
    """Says what is wrong with a text that is JSON."""


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuses a name that is given twice: readers differ in which of its values they take."""
    made = dict(members)
    if len(made) < len(members):
        counts = Counter(name for name, _ in members)
        raise _Unfit(f"it gives {shown(counts.most_common(1)[0][0])} twice in an object")
    return made


def _is_deep(value: Any) -> bool:
    """Whether a value is nested more than `MAX_DEPTH` deep. Goes down level by level, without
    calls in each other.
    """
    level = [value]
    for _ in range(MAX_DEPTH):
        holders = [holder for holder in level if isinstance(holder, list | dict)]
        if not holders:
            return False
        level = [
            child
            for holder in holders
            for child in (holder.values() if isinstance(holder, dict) else holder)
        ]
    return any(isinstance(holder, list | dict) for holder in level)
