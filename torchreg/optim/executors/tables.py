"""The tables of a kernel's step, kept from one step to the next."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchreg.kernels.step_tables import Tables
from torchreg.optim.executors.job import Job
from torchreg.optim.executors.specs import layout_settings
from torchreg.optim.step_sizes import UNIT_MOMENTUM, Group, State
from torchreg.penalties import Penalty
from torchreg.penalties.coefficients import L1L2

Layout = tuple[torch.dtype, tuple[int, ...], int]

UNPENALIZED = L1L2(0.0, 0.0)
"""The coefficients of a parameter without a penalty."""


class Inputs:
    """The inputs of a step: its parameters with a gradient, and all that decides whether kept tables are still valid.

    Attributes:
        penalties: the penalty of each parameter, or `UNPENALIZED`.
        settings: those that shape the tables.
        states: every entry of the optimizer's state.
    """

    def __init__(self, job: Job) -> None:
        self.groups: list[Group] = []
        self.parameters: list[Tensor] = []
        self.gradients: list[Tensor] = []
        for group in job.optimizer.param_groups:
            for w in group["params"]:
                gradient = w.grad
                if gradient is not None:
                    self.groups.append(group)
                    self.parameters.append(w)
                    self.gradients.append(gradient)
        self.states: list[State] = list(job.optimizer.state.values())
        self.settings: list[Any] = [job.rounding, *map(layout_settings, job.optimizer.param_groups)]
        self.penalties: list[Penalty | L1L2] = [
            UNPENALIZED if (penalty := job.penalties.get(id(w))) is None else penalty for w in self.parameters
        ]

    def coefficients(self) -> list[L1L2] | None:
        """λ₁ and λ₂ of each parameter; None where a penalty is not a sum of |w| and w², or all strengths are 0."""
        every = [x if isinstance(x, L1L2) else x.coefficients() for x in self.penalties]
        known = [x for x in every if x is not None]
        return known if len(known) == len(every) and any(x.l1 or x.l2 for x in known) else None


@dataclass
class StepTables:
    """The tables of a step, with all that they were made from.

    To make them costs as much as to step a small network, so they are compared instead: by identity and by address.

    Attributes:
        coefficients: λ₁ and λ₂ of each parameter, as they stand in the tables.
        lrs: the learning rate of each parameter, as it stands in the tables.
        slots: (state, name, tensor) of every tensor of the state that the tables point to.
        memory: every tensor that the tables point to, gradients apart.
        addresses: where each of `memory` lay.
        local: gives the part of a sharded tensor that lies in this process; None where no weight is sharded.
        momenta: (row, state, (a, b, p, q)) of each penalized parameter with a momentum: see `Spec.unit_response`.
    """

    inputs: Inputs
    coefficients: list[L1L2] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    slots: list[tuple[State, str, Tensor]] = field(default_factory=list)
    memory: list[Tensor] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)
    local: Callable[[Tensor], Tensor] | None = None
    layouts: list[Layout] = field(default_factory=list)
    momenta: list[tuple[int, State, tuple[float, float, float, float]]] = field(default_factory=list)
    tables: Tables = field(default_factory=Tables)

    def keep_track_of(self, tensors: Sequence[Tensor | None]) -> None:
        """Tensors of the tables, whose addresses must stay."""
        known = [x for x in tensors if x is not None]
        self.memory += known
        self.addresses += self._addresses(known)

    def still_valid(self, inputs: Inputs) -> bool:
        """The step is one of the same tensors under the same settings."""
        known = self.inputs
        return (
            _same(inputs.parameters, known.parameters)
            and _same(inputs.groups, known.groups)
            and _same(inputs.states, known.states)
            and inputs.settings == known.settings
            and all(state.get(name) is tensor for state, name, tensor in self.slots)
            and self._addresses(self.memory) == self.addresses
            and self._update_strengths(inputs)
        )

    def _addresses(self, tensors: Sequence[Tensor]) -> list[int]:
        return [x.data_ptr() for x in (tensors if self.local is None else map(self.local, tensors))]

    def _update_strengths(self, inputs: Inputs) -> bool:
        """Writes the strengths, which schedules change; False where more than numbers has changed."""
        if _same(inputs.penalties, self.inputs.penalties):
            return True
        new = inputs.coefficients()
        if new is None or any(
            x.anchor is not y.anchor or (p is UNPENALIZED) != (q is UNPENALIZED)
            for x, y, p, q in zip(new, self.coefficients, inputs.penalties, self.inputs.penalties, strict=True)
        ):
            return False
        for i, x in enumerate(new):
            at = (i + 1) * self.tables.number_width - self.tables.filled_in
            self.tables.numbers[at - 2], self.tables.numbers[at - 1] = x.l1, x.l2
        self.inputs.penalties, self.coefficients = inputs.penalties, new
        return True

    def set_gradients(self, gradients: Sequence[Tensor | None]) -> bool:
        """Writes the gradients' addresses; False where a kernel cannot read one in the order of its weight."""
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

    def set_lrs(self, lrs: list[float]) -> None:
        """Writes the learning rates."""
        if lrs != self.lrs:
            self.lrs = lrs
            for row, lr in enumerate(lrs):
                self.tables.numbers[row * self.tables.number_width + 1] = lr

    def advance_momenta(self) -> bool:
        """Takes the unit responses one step on; False where one has no number to go on from."""
        news = []
        for row, state, (a, b, p, q) in self.momenta:
            old = state.get(UNIT_MOMENTUM)
            if not isinstance(old, float):
                return False
            new = a * old + b
            news.append((row, state, new, p + q * new))
        for row, state, new, response in news:
            state[UNIT_MOMENTUM] = new
            self.tables.numbers[row * self.tables.number_width] = response
        return True


def _same(a: Sequence[object], b: Sequence[object]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))
