"""Steps of bfloat16 and float16 weights: in float32, with the prox, and rounded once."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from torchreg.optim.executors.job import Executor, Job
from torchreg.optim.executors.plain import Plain, fused
from torchreg.optim.executors.rounding import NARROW, Rounding
from torchreg.optim.step_sizes import Group, State
from torchreg.penalties import Penalty

AT_ONCE = 1 << 22
"""Weights that have copies in float32 at a time; a single parameter may have more."""


class LowPrecision(Executor):
    """The plain step of float32 copies of weights, gradients and state, which are then rounded.

    It takes steps in which some weight is narrower than float32; wider ones take the same step as they are.
    """

    def step(self, job: Job) -> bool:
        if not has_narrow_weights(job.optimizer) or job.is_stock:
            return False
        for batch in _batches(job.optimizer):
            _step(job, batch)
        return True


def has_narrow_weights(optimizer: Optimizer) -> bool:
    """Some weight with a gradient is narrower than float32, and the optimizer is not differentiable."""
    return not optimizer.defaults.get("differentiable") and any(
        w.dtype in NARROW and w.grad is not None for group in optimizer.param_groups for w in group["params"]
    )


Numbered = tuple[Group, int, Tensor]
"""A parameter with its group, and its number in the optimizer."""


def _step(job: Job, batch: list[Numbered]) -> None:
    """One step of some of the parameters."""
    optimizer, old_state = job.optimizer, job.optimizer.state
    groups: list[Group] = []
    state: defaultdict[Tensor, State] = defaultdict(dict)
    penalties: dict[int, Penalty | None] = {}
    copies: list[tuple[int, Tensor, Tensor]] = []
    for group, number, w in batch:
        if not groups or groups[-1]["of"] is not group:
            groups.append({**group, "params": [], "of": group})
        stepped, penalty = w, job.penalties.get(id(w))
        if w.dtype in NARROW:
            stepped = _widened(w)
            state[stepped] = {key: x.float() if _is_narrow(x) else x for key, x in old_state[w].items()}
            copies.append((number, w, stepped))
            penalty = None if penalty is None else penalty.rounded_to(w.dtype)
        else:
            state[stepped] = old_state[w]
        groups[-1]["params"].append(stepped)
        if id(w) in job.penalties:
            penalties[id(stepped)] = penalty
    with _lent(optimizer, groups, state):
        Plain().step(dataclasses.replace(job, stock=fused(job.stock), penalties=penalties))
    with torch.no_grad():
        for number, w, wide in copies:
            _round(optimizer, w, wide, state[wide], number, job.rounding)


@contextlib.contextmanager
def _lent(optimizer: Optimizer, groups: list[Group], state: defaultdict[Tensor, State]) -> Iterator[None]:
    """The optimizer has other groups and another state inside the block."""
    own = optimizer.param_groups, optimizer.state
    optimizer.param_groups, optimizer.state = groups, state
    try:
        yield
    finally:
        optimizer.param_groups, optimizer.state = own


def _batches(optimizer: Optimizer) -> Iterator[list[Numbered]]:
    """The parameters with a gradient, as many at a time as may have copies."""
    batch: list[Numbered] = []
    number, copied = -1, 0
    for group in optimizer.param_groups:
        for w in group["params"]:
            number += 1
            if w.grad is None:
                continue
            size = w.numel() if w.dtype in NARROW else 0
            if batch and copied + size > AT_ONCE:
                yield batch
                batch, copied = [], 0
            batch.append((group, number, w))
            copied += size
    if batch:
        yield batch


def _widened(w: Tensor) -> Tensor:
    assert w.grad is not None
    wide = Parameter(w.detach().float(), requires_grad=False)
    wide.grad = w.grad.float()
    return wide


def _is_narrow(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in NARROW


def _round(optimizer: Optimizer, w: Tensor, wide: Tensor, wide_state: State, number: int, rounding: Rounding) -> None:
    """Writes the weight and the state of its copy back; memory that is there already is kept."""
    state, numbers = optimizer.state[w], {"": (w, wide)}
    for key, value in wide_state.items():
        if key != "step" and isinstance(value, Tensor) and value.shape == w.shape:
            narrow = state.get(key)
            wide_state[key] = narrow if narrow is not None and _is_narrow(narrow) else torch.empty_like(w)
            numbers[key] = (wide_state[key], value)
    rounding.write(numbers, optimizer, wide_state, number)
    state.clear()
    state.update(wide_state)
