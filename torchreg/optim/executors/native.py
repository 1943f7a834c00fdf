"""The stock step and the prox in one pass over memory, where the native library serves."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter
from torch.optim import SGD, Adam, AdamW, Optimizer

from torchreg._distributed import is_laid_out_as, is_sharded, local_part
from torchreg._tensors import is_laid_out_like
from torchreg.kernels.backend import native
from torchreg.kernels.l1l2 import serves
from torchreg.kernels.native import DTYPES, Library
from torchreg.kernels.step_tables import AdamNumbers, SGDNumbers, Tables
from torchreg.optim.executors.rounding import NARROW, Rounding
from torchreg.optim.step_sizes import Followed, _number
from torchreg.penalties import Penalty
from torchreg.penalties.coefficients import L1L2

Group = dict[str, Any]
State = dict[str, Any]
Layout = tuple[torch.dtype, tuple[int, ...], int]

FREE = L1L2(0.0, 0.0)
"""Of a parameter that is not regularized."""

STEPPED = (torch.float32, torch.float64, torch.bfloat16)
"""The dtypes of weights that the native step takes."""

NO_KEY = -1
"""Of a parameter that is not rounded by chance."""


@dataclass
class Rows:
    """The tables of a step, kept from one to the next, with all that they were made from.

    To make them costs as much as to step a small network, so they are compared instead: by identity and by address.

    Attributes:
        slots: (state, name, buffer) of every buffer.
        memory, pointers: every tensor of the tables but the gradients, and where it lay.
        sharded: some are sharded, and it is the parts of this process that the tables point to.
        units: (row, state, a, b, p, q) of each regularized parameter with a momentum: see `OnePass.unit`.
    """

    parameters: list[Tensor]
    states: list[Any]
    settings: list[Any]
    asked: list[Any]
    softs: list[L1L2] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    slots: list[tuple[State, str, Tensor]] = field(default_factory=list)
    memory: list[Tensor] = field(default_factory=list)
    pointers: list[int] = field(default_factory=list)
    sharded: bool = False
    layouts: list[Layout] = field(default_factory=list)
    units: list[tuple[int, State, tuple[float, float, float, float]]] = field(default_factory=list)
    tables: Tables = field(default_factory=Tables)

    def stand(self, parameters: list[Tensor], states: list[Any], settings: list[Any]) -> bool:
        """The step is still one of the same tensors under the same settings."""
        return (
            _same(parameters, self.parameters)
            and _same(states, self.states)
            and settings == self.settings
            and all(state.get(name) is buffer for state, name, buffer in self.slots)
            and [w.data_ptr() for w in (map(_memory, self.memory) if self.sharded else self.memory)] == self.pointers
        )

    def strengthen(self, asked: list[Any]) -> bool:
        """The strengths are those of `asked`, which schedules change; False where more than numbers has changed."""
        if _same(asked, self.asked):
            return True
        softs = [_soft(x) for x in asked]
        for new, old, x, y in zip(softs, self.softs, asked, self.asked, strict=True):
            if new is None or new.anchor is not old.anchor or (x is FREE) != (y is FREE):
                return False
        known = [soft for soft in softs if soft is not None]
        if all(soft.l1 == soft.l2 == 0 for soft in known):
            return False
        for i, soft in enumerate(known):
            at = (i + 1) * self.tables.number_width - self.tables.filled_in
            self.tables.numbers[at - 2], self.tables.numbers[at - 1] = soft.l1, soft.l2
        self.asked, self.softs = asked, known
        return True

    def point_to(self, gradients: Sequence[Tensor | None]) -> bool:
        """The gradients are in the tables; False where C cannot read one in the order of its weight."""
        addresses, width, device = self.tables.addresses, self.tables.address_width, self.memory[0].device
        for i, (gradient, (dtype, stride, size)) in enumerate(zip(gradients, self.layouts, strict=True)):
            if (
                gradient is None
                or type(gradient) is not Tensor
                or gradient.dtype is not dtype
                or gradient.layout is not torch.strided
                or gradient.stride() != stride
                or gradient.numel() != size
                or gradient.device != device
                or gradient.is_neg()
            ):
                return False
            addresses[i * width + 1] = gradient.data_ptr()
        return True

    def follow(self) -> bool:
        """Takes the unit responses one step on; False where one has no number to go on from."""
        news = []
        for row, state, (a, b, p, q) in self.units:
            old = state.get(Followed.KEY)
            if not isinstance(old, float):
                return False
            new = a * old + b
            news.append((row, state, new, p + q * new))
        numbers, width = self.tables.numbers, self.tables.number_width
        for row, state, new, unit in news:
            state[Followed.KEY] = new
            numbers[row * width] = unit
        return True


class OnePass(ABC):
    """One optimizer's steps in the native library, as far as it can take them.

    It takes dense weights, gradients and buffers of one dtype, float32, float64 or bfloat16, and of one memory layout,
    on the CPU, with penalties that are sums of |w| and w². All else is left to the stock step and the prox after it:
    the very first step, which builds the state, too. A weight differs from theirs by at most 4 roundings of the terms
    that it is the sum of (itself, its move, its threshold), and by no bit between processors or numbers of threads.
    bfloat16 is stepped in float32, of which that holds, and rounded once, with the same random bits.
    """

    def __init__(self, stock: type[Optimizer]) -> None:
        self.stock = stock
        self._rows: Rows | None = None

    def step(self, optimizer: Optimizer, penalties: Mapping[int, Penalty | None], rounding: Rounding) -> bool:
        """Takes a step and its prox and returns True; or returns False, and nothing has changed."""
        library = native()
        if library is None or _is_scaled(optimizer):
            return False
        groups, parameters, gradients = with_gradients(optimizer)
        states = list(optimizer.state.values())
        asked = [penalties.get(id(parameter), FREE) for parameter in parameters]
        settings = [rounding, *(_settings(group) for group in optimizer.param_groups)]
        known = self._rows
        if known is None or not (known.stand(parameters, states, settings) and known.strengthen(asked)):
            self._rows = self._made(optimizer, groups, parameters, states, settings, asked, rounding)
        rows = self._rows
        if rows is None:
            return False
        parts: Sequence[Tensor | None] = gradients
        if rows.sharded:
            parts = [_here(gradient, parameter) for gradient, parameter in zip(gradients, parameters, strict=True)]
        if not (rows.point_to(parts) and rows.follow()):
            return False
        lrs = [_number(group["lr"]) for group in groups]
        if lrs != rows.lrs:
            rows.lrs = lrs
            for row, lr in enumerate(lrs):
                rows.tables.numbers[row * rows.tables.number_width + 1] = lr
        rows.tables.run(self.kernel(library), library)
        increment_version(parameters if not rows.sharded else [*parameters, *map(_memory, parameters)])
        return True

    # ------------------------------------------------------------------ what differs by optimizer

    @abstractmethod
    def kernel(self, library: Library) -> Any:
        """The function of the native library."""

    @abstractmethod
    def takes(self, group: Group) -> bool:
        """The settings of this group are among those that the native step knows."""

    @abstractmethod
    def buffers(self, group: Group) -> Sequence[str]:
        """The names of a parameter's buffers in the order of the kernel's table; "" for one that is not used."""

    @abstractmethod
    def numbers(self, group: Group, soft: L1L2, key: int) -> AdamNumbers | SGDNumbers:
        """The row of numbers of a parameter; a momentum's unit response comes with each step."""

    @abstractmethod
    def unit(self, group: Group) -> tuple[float, float, float, float] | None:
        """(a, b, p, q), where the momentum of a constant 1 goes c ← a·c + b and the response over lr is p + q·c."""

    def counter(self, state: State) -> Tensor | None:
        """The count of steps, where there is one: Adam's, or that of the random bits."""
        return state.get("step")

    # ------------------------------------------------------------------ the tables

    def _made(
        self,
        optimizer: Optimizer,
        groups: list[Group],
        parameters: list[Tensor],
        states: list[Any],
        settings: list[Any],
        asked: list[Any],
        rounding: Rounding,
    ) -> Rows | None:
        """The tables; None where something is not for the native library, or for no prox at all."""
        softs = [_soft(x) for x in asked]
        if all(soft is not None and soft.l1 == soft.l2 == 0 for soft in softs):
            return None  # the stock step, bit for bit
        rows = Rows(parameters, states, settings, asked)
        numbers = []
        for i, (group, parameter, soft) in enumerate(zip(groups, parameters, softs, strict=True)):
            state = optimizer.state.get(parameter, {})
            names = self.buffers(group)
            if soft is None or not self.takes(group) or any(name and state.get(name) is None for name in names):
                return None
            count = self.counter(state)
            # Of a sharded weight each process steps its own part.
            part = _here(parameter, parameter)
            anchor = None if soft.anchor is None else _here(soft.anchor, parameter)
            buffers = [_here(state[name], parameter) if name else None for name in names]
            others = [buffer for name, buffer in zip(names, buffers, strict=True) if name]
            if part is None or any(other is None or not is_laid_out_like(other, part) for other in others):
                return None
            if not serves(part, anchor, STEPPED) or (soft.anchor is not None and anchor is None):
                return None
            key = rounding.key(state) if parameter.dtype in NARROW else NO_KEY
            if key is None or not (count is None or _counts(count)):
                return None
            rows.slots += [(state, name, state[name]) for name in names if name]
            rows.sharded = rows.sharded or part is not parameter
            kept = [state[name] for name in names if name]
            known = [w for w in (parameter, *kept, soft.anchor, count) if w is not None]
            rows.memory += known
            rows.pointers += [_memory(w).data_ptr() for w in known]
            rows.layouts.append((part.dtype, part.stride(), part.numel()))
            unit = self.unit(group)
            if unit is not None and asked[i] is not FREE:
                rows.units.append((i, state, unit))
            counted = (0, 0) if count is None else (count.data_ptr(), DTYPES[count.dtype])
            addresses = [0 if w is None else w.data_ptr() for w in (*buffers, anchor)]
            rows.tables.add((part.data_ptr(), 0, *addresses, *counted, part.numel(), DTYPES[part.dtype]))
            numbers.append(self.numbers(group, soft, key))
            rows.softs.append(soft)
            rows.lrs.append(_number(group["lr"]))
        rows.tables.number(numbers)
        return rows


class AdamPass(OnePass):
    """Adam and AdamW."""

    def kernel(self, library: Library) -> Any:
        return library.adam

    def takes(self, group: Group) -> bool:
        return (
            _is_open(group) and not group["capturable"] and not any(isinstance(beta, Tensor) for beta in group["betas"])
        )

    def buffers(self, group: Group) -> Sequence[str]:
        return "exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else ""

    def unit(self, group: Group) -> tuple[float, float, float, float]:
        beta1 = group["betas"][0]
        return beta1, 1 - beta1, 0.0, 1.0

    def numbers(self, group: Group, soft: L1L2, key: int) -> AdamNumbers:
        # AdamW of torch before 2.7 has no such key.
        decoupled = group.get("decoupled_weight_decay", self.stock is AdamW)
        return AdamNumbers(
            unit=0.0,
            lr=_number(group["lr"]),
            decay=group["weight_decay"],
            decoupled=decoupled,
            sign=-1.0 if group["maximize"] else 1.0,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            key=key,
            strength1=soft.l1,
            strength2=soft.l2,
        )


class SGDPass(OnePass):
    """SGD, with and without momentum."""

    def kernel(self, library: Library) -> Any:
        return library.sgd

    def takes(self, group: Group) -> bool:
        return _is_open(group)

    def buffers(self, group: Group) -> Sequence[str]:
        return ("momentum_buffer" if group["momentum"] != 0 else "",)

    def unit(self, group: Group) -> tuple[float, float, float, float] | None:
        momentum = group["momentum"]
        if momentum == 0:
            return None
        return momentum, 1 - group["dampening"], *((1.0, momentum) if group["nesterov"] else (0.0, 1.0))

    def numbers(self, group: Group, soft: L1L2, key: int) -> SGDNumbers:
        return SGDNumbers(
            unit=1.0,
            lr=_number(group["lr"]),
            decay=group["weight_decay"],
            sign=-1.0 if group["maximize"] else 1.0,
            momentum=group["momentum"],
            gain=1 - group["dampening"],
            ahead=group["momentum"] if group["nesterov"] else 0.0,
            key=key,
            strength1=soft.l1,
            strength2=soft.l2,
        )


PASSES: dict[type[Optimizer], type[OnePass]] = {SGD: SGDPass, Adam: AdamPass, AdamW: AdamPass}


def with_gradients(optimizer: Optimizer) -> tuple[list[Group], list[Tensor], list[Tensor]]:
    """The group, the parameter and the gradient of each parameter that has one."""
    groups, parameters, gradients = [], [], []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is not None:
                groups.append(group)
                parameters.append(parameter)
                gradients.append(gradient)
    return groups, parameters, gradients


def _here(x: Tensor, like: Tensor) -> Tensor | None:
    """What this process has of it; None where it is divided in another way than `like`."""
    if type(x) in (Tensor, Parameter):
        return x if type(like) in (Tensor, Parameter) else None
    return _memory(x) if is_sharded(x) and is_laid_out_as(x, like) else None


@torch.no_grad()
def _memory(x: Tensor) -> Tensor:
    """What this process has of it, as it lies there."""
    return local_part(x)


def _soft(asked: Penalty | L1L2 | None) -> L1L2 | None:
    """The penalty as numbers; None where it is another one."""
    return FREE if asked is None else asked if isinstance(asked, L1L2) else asked.coefficients()


def _settings(group: Group) -> list[Any]:
    """All that shapes the tables; lr, which schedulers change at every step, is written into them."""
    return [value for key, value in group.items() if key not in ("params", "lr", "initial_lr")]


def _is_open(group: Group) -> bool:
    """The choice of an implementation is left open, or a fused one is asked for; and all settings are numbers."""
    lr = group["lr"]
    return (
        group["foreach"] is None
        and group["fused"] is not False
        and not group["differentiable"]
        and not (isinstance(lr, Tensor) and (lr.requires_grad or not lr.is_cpu))
        and not any(isinstance(group.get(key), Tensor) for key in ("weight_decay", "momentum", "dampening", "eps"))
    )


def _is_scaled(optimizer: Any) -> bool:
    """A GradScaler asks a fused optimizer to unscale the gradients, and to look whether they are finite."""
    return getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None


def _same(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _counts(count: Tensor) -> bool:
    return count.is_cpu and count.dtype in (torch.float32, torch.float64) and type(count) is Tensor
