"""Checks of single numbers and steps, each with an error that gives the value, the reason and the next move."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

Step = float | Tensor
"""A prox step: a number, or a tensor that broadcasts against the weights."""


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


def above(name: str, value: object, floor: float, next_move: str) -> float:
    """`value` as a float if it is a finite number > floor ≥ 0, else an error that ends with `next_move`."""
    number = nonnegative(name, value, next_move)
    if number <= floor:
        raise ValueError(f"{name}={value!r} must be more than {floor:g}; {next_move}")
    return number


def whole(name: str, value: object, least: int = 1) -> int:
    """`value` as an int if it is a whole number, at least `least`.

    >>> whole("steps", 0)
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


def state(value: object, names: Sequence[str]) -> Mapping[str, Any]:
    """`value` if it is a state with exactly these entries, else an error."""
    if not isinstance(value, Mapping) or set(value) != set(names):
        what = f"a dict with {list(value)[:3]}" if isinstance(value, Mapping) else type(value).__name__
        raise TypeError(f"expected a state with {', '.join(names)}, got {what}; load what state_dict() gave")
    return value


def step(value: object, shape: torch.Size) -> Step:
    """`value` as a prox step for weights of `shape`. Reads a tensor, so it may synchronize with its device.

    Under a transformation of `torch.func` there are no entries to read, so there they are taken on trust.

    >>> step(-0.1, torch.Size([3]))
    Traceback (most recent call last):
    ...
    ValueError: step=-0.1 must be finite and at least 0; pass the learning rate, or a tensor of steps
    """
    if not isinstance(value, Tensor):
        return nonnegative("step", value, "pass the learning rate, or a tensor of steps")
    if not value.is_floating_point():
        raise TypeError(f"step has dtype {value.dtype}; steps are real floating-point numbers, convert with .float()")
    try:
        fits = torch.broadcast_shapes(value.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"step of shape {tuple(value.shape)} does not broadcast to weights of shape {tuple(shape)}; "
            "pass a number, or one step per weight"
        )
    here = local(value)
    fine = (here >= 0) & here.isfinite()
    if not value.is_meta and not is_transformed() and not bool(fine.all()):
        raise ValueError(
            f"step has the entry {here[~fine][0].item()}; every entry must be finite and at least 0: "
            "pass the learning rate, or a tensor of steps"
        )
    return widened(value)


def weights(name: str, w: object) -> Tensor:
    """`w` if it is a floating or complex tensor, else an error."""
    if not isinstance(w, Tensor):
        raise TypeError(
            f"{name} takes a tensor of weights, got {type(w).__name__}; for a model use Regularizer(model, ...)"
        )
    if not (w.is_floating_point() or w.is_complex()):
        raise TypeError(f"{name} needs floating or complex weights, got {w.dtype}; convert them with .float()")
    return w


def widened(w: Tensor) -> Tensor:
    """`w` in float32 or wider: sums of float16 overflow, and bfloat16 rounds a total to 8 bits."""
    if w.dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        return w
    return w.to(torch.complex64 if w.is_complex() else torch.float32)


def is_transformed() -> bool:
    """This runs under `vmap`, `grad` or another transformation of `torch.func`, which stands in for the tensors."""
    return bool(torch._C._are_functorch_transforms_active())


def is_differentiated() -> bool:
    """This runs under a derivative of `torch.func`: through `vmap` alone autograd sees."""
    functorch = torch._C._functorch
    differentiating = (functorch.TransformType.Grad, functorch.TransformType.Jvp)
    return any(level.key() in differentiating for level in functorch.get_interpreter_stack() or ())


def is_sharded(w: Tensor) -> bool:
    """Each process has a shard of it (a DTensor)."""
    return hasattr(w, "full_tensor")


def local(x: Tensor) -> Tensor:
    """What this process has of it: all, where it is not sharded. Autograd follows."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined, no-any-return]


def unsharded(w: Tensor) -> Tensor:
    """All of `w` where it is sharded: a collective, so every process has to come here."""
    return w.full_tensor() if is_sharded(w) else w  # type: ignore[attr-defined]
