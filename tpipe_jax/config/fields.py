"""The types of settings, with ranges, and the check of a value against them."""

import math
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from tpipe_jax.errors import UserError, shown


@dataclass(frozen=True)
class Range:
    """The values that a numeric field may take: from `low` to `high`, and less than `below`."""

    low: float
    high: float = math.inf
    below: float = math.inf
    is_open: bool = False
    """Whether `low` itself is left out."""

    def __contains__(self, value: float) -> bool:
        is_enough = value > self.low if self.is_open else value >= self.low
        return is_enough and value <= self.high and value < self.below

    def __str__(self) -> str:
        if self.is_open:
            return f"more than {self.low:g}"
        if self.high < math.inf:
            return f"between {self.low:g} and {self.high:g}"
        return f"at least {self.low:g}" + (
            f" and below {self.below:g}" if self.below < math.inf else ""
        )


MAX_FLOAT = 10**300  # of whole numbers where a float belongs, which may not overflow
MAX_INT = 2**31 - 1  # the devices count in int32
Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, is_open=True)]
Fraction = Annotated[float, Range(0, below=1)]


def parts_of(hint: Any) -> tuple[Any, bool, Range | None]:
    """Returns a field's bare type, whether it may be None, and its range if it has one."""
    allowed, is_optional = None, False
    while get_origin(hint) in (Annotated, types.UnionType, Union):
        if get_origin(hint) is Annotated:
            hint, *notes = get_args(hint)
            allowed = next((note for note in notes if isinstance(note, Range)), allowed)
            continue
        options = [option for option in get_args(hint) if option is not type(None)]
        if len(options) > 1:
            break
        hint, is_optional = options[0], True
    return hint, is_optional, allowed


def check_field(path: str, hint: Any, value: Any) -> None:
    """Raises `UserError` if a value has the wrong type, or is out of the range of its setting."""
    hint, is_optional, allowed = parts_of(hint)
    if value is None and is_optional:
        return
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise UserError(
                f"{path}={shown(repr(value))} is not one of {', '.join(get_args(hint))}."
            )
        return
    accepted = (int, float) if hint is float else hint
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{path}={shown(repr(value))} must be of type {hint.__name__}.")
    is_huge = hint is float and isinstance(value, int) and abs(value) > MAX_FLOAT
    if is_huge or (allowed is not None and hint is float and not math.isfinite(value)):
        raise UserError(f"{path}={shown(value)} must be a finite number.")
    if hint is int and value > MAX_INT:
        raise UserError(f"{path}={shown(value)} must be at most {MAX_INT}.")
    if allowed is not None and value not in allowed:
        raise UserError(f"{path}={shown(value)} must be {allowed}.")
