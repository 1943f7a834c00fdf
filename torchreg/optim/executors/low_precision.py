"""The stock step and the prox of bfloat16 and float16 weights: in float32, and rounded once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from torchreg.optim.attachment import Frozen
from torchreg.optim.executors.rounding import NARROW, Rounding
from torchreg.optim.step_sizes import StepSize
from torchreg.penalties import Penalty

AT_ONCE = 1 << 22
"""Weights of which there are copies in float32 at a time; or a single parameter, which may have more."""

Group = dict[str, Any]
State = dict[str, Any]


def has_narrow(optimizer: Optimizer) -> bool:
    """Some weight of this step is narrower than float32, in a step whose graph does not lead through the weights."""
    return not optimizer.defaults.get("differentiable") and any(
        p.dtype in NARROW and p.grad is not None for group in optimizer.param_groups for p in group["params"]
    )


def wide_step(
    optimizer: Optimizer,
    stock: Callable[[Optimizer], Any],
    penalties: Mapping[int, Penalty | None],
    step_size: StepSize,
    rounding: Rounding,
) -> None:
    """The step of `stock`, then the prox, as on a float32 copy of weights, gradients and state; then one rounding.

    Parameters in float32 or wider take the same step as they are.
    """
    for batch in _batches(optimizer):
        stand_ins: list[tuple[int, Tensor, Tensor]] = []
        groups: list[Group] = []
        state: defaultdict[Tensor, State] = defaultdict(dict)
        pairs: list[tuple[Tensor, Penalty | None]] = []
        for group, number, parameter in batch:
            if not groups or groups[-1]["of"] is not group:
                groups.append({**group, "params": [], "of": group})
            wide, penalty = parameter, penalties.get(id(parameter))
            if parameter.dtype in NARROW:
                wide = _widened(parameter)
                state[wide] = {
                    key: value.float() if _is_narrow(value) else value
                    for key, value in optimizer.state[parameter].items()
                }
                stand_ins.append((number, parameter, wide))
                penalty = None if penalty is None else penalty.rounded_to(parameter.dtype)
            else:
                state[wide] = optimizer.state[parameter]
            groups[-1]["params"].append(wide)
            if id(parameter) in penalties:
                pairs.append((wide, penalty))
        stand_in = object.__new__(type(optimizer))
        stand_in.__dict__.update(optimizer.__dict__, param_groups=groups, state=state)
        prox = Frozen(pairs, step_size)
        prox.before(stand_in)
        stock(stand_in)
        prox.apply(stand_in)
        with torch.no_grad():
            for number, parameter, wide in stand_ins:
                _round(optimizer, parameter, wide, state[wide], number, rounding)


def _batches(optimizer: Optimizer) -> Iterator[list[tuple[Group, int, Tensor]]]:
    """Parameters with a gradient, as many at a time as may have copies: (group, number in the optimizer, parameter)."""
    batch: list[tuple[Group, int, Tensor]] = []
    number, copied = -1, 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            number += 1
            if parameter.grad is None:
                continue
            size = parameter.numel() if parameter.dtype in NARROW else 0
            if batch and copied + size > AT_ONCE:
                yield batch
                batch, copied = [], 0
            batch.append((group, number, parameter))
            copied += size
    if batch:
        yield batch


def _widened(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    wide = Parameter(parameter.detach().float(), requires_grad=False)
    wide.grad = parameter.grad.float()
    return wide


def _is_narrow(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in NARROW


def _round(
    optimizer: Optimizer, parameter: Tensor, wide: Tensor, found: State, number: int, rounding: Rounding
) -> None:
    """Writes the weight and the state of its stand-in back; memory that is there already is kept."""
    state, numbers = optimizer.state[parameter], {"": (parameter, wide)}
    for key, value in found.items():
        if key != "step" and isinstance(value, Tensor) and value.shape == parameter.shape:
            narrow = state.get(key)
            found[key] = narrow if narrow is not None and _is_narrow(narrow) else torch.empty_like(parameter)
            numbers[key] = (found[key], value)
    rounding.write(numbers, optimizer, found, number)
    state.clear()
    state.update(found)
