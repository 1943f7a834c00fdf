"""Checks of numbers and states, each with an error that gives the value, the reason and the next move."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any


def nonnegative(name: str, value: object, next_move: str) -> float:
    """`value` as a float if it is a finite number ≥ 0, else an error that ends with `next_move`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}, not a number; {next_move}")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the largest float
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name}={value!r} must be finite and at least 0; {next_move}")
    return number


def greater_than(name: str, value: object, floor: float, next_move: str) -> float:
    """`value` as a float if it is a finite number > floor ≥ 0, else an error that ends with `next_move`."""
    number = nonnegative(name, value, next_move)
    if number <= floor:
        raise ValueError(f"{name}={value!r} must be more than {floor:g}; {next_move}")
    return number


def whole_number(name: str, value: object, least: int = 1) -> int:
    """`value` as an int if it is a whole number, at least `least`.

    >>> whole_number("steps", 0)
    Traceback (most recent call last):
    ...
    ValueError: steps=0 must be at least 1; pass a whole number
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        kind = type(value).__name__
        raise TypeError(f"{name}={value!r} is a {kind}, not a whole number; round it with int()") from None
    if number < least:
        raise ValueError(f"{name}={value} must be at least {least}; pass a whole number")
    return number


def checked_state(value: object, names: Sequence[str]) -> Mapping[str, Any]:
    """`value` if it is a state with exactly these entries, else an error."""
    if not isinstance(value, Mapping) or set(value) != set(names):
        what = f"a dict with {list(value)[:3]}" if isinstance(value, Mapping) else type(value).__name__
        raise TypeError(f"expected a state with {', '.join(names)}, got {what}; load what state_dict() gave")
    return value
