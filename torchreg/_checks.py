"""Checks of numbers and states. Each error gives the value, the reason and the next move."""

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
    """`value` as an int if it is a whole number ≥ `least`, else an error.

    >>> whole_number("steps", 0)
    Traceback (most recent call last):
    ...
    ValueError: steps=0 must be at least 1; pass a whole number
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}, not a whole number; round it with int()")
    if number < least:
        raise ValueError(f"{name}={value} must be at least {least}; pass a whole number")
    return number


def checked_state(value: object, names: Sequence[str]) -> Mapping[str, Any]:
    """`value` if it is a dict with exactly these keys, as `state_dict()` returns it; else an error."""
    if not isinstance(value, Mapping) or set(value) != set(names):
        found = f"a dict with {list(value)[:3]}" if isinstance(value, Mapping) else type(value).__name__
        raise TypeError(f"expected a state with {', '.join(names)}, got {found}; load the result of state_dict()")
    return value
