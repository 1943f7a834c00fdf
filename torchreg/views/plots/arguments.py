"""Checks of the numbers that plots are given: arrays, tensors, lists, and dicts of them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def finite_numbers(name: str, values: Any, dims: tuple[int, ...]) -> Tensor:
    """`values` as finite float64 on the CPU, with a number of dimensions in `dims`; lists may hold tensors."""
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor(_as_lists(values), dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            kind = ValueError if isinstance(error, ValueError) else TypeError
            raise kind(f"{name} is not an array of real numbers ({error}); pass an array, a tensor or lists") from error
    if values.is_complex():
        raise TypeError(f"{name} is complex, and a plot has no axis for it; pass its modulus, .abs()")
    numbers = values.detach().cpu().double()
    if numbers.dim() not in dims or not numbers.numel():
        expected = " or ".join(map(str, dims))
        raise ValueError(
            f"{name} has shape {tuple(numbers.shape)}, but it needs {expected} dimensions and at least one number; "
            "see the shapes in the docstring"
        )
    if not bool(numbers.isfinite().all()):
        count = int((~numbers.isfinite()).sum())
        raise ValueError(f"{name} has {count} of {numbers.numel()} numbers that are not finite; leave these out")
    return numbers


def _as_lists(values: Any) -> Any:
    """`values` with lists in place of arrays and tensors, since torch does not support all strides and byte orders."""
    if hasattr(values, "tolist"):
        return values.tolist()
    if isinstance(values, str):  # csv.DictReader returns numbers as text
        with contextlib.suppress(ValueError):
            return float(values)
    return [_as_lists(value) for value in values] if isinstance(values, (list, tuple)) else values


def nonempty_mapping(name: str, values: object) -> Mapping[str, Any]:
    """`values` if it is a mapping with at least one entry, otherwise an error."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} is a {type(values).__name__}; pass a dict from the name in the legend to the numbers")
    if not values:
        raise ValueError(f"{name} is empty; give at least one entry")
    return values
