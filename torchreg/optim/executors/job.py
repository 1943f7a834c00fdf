"""A proximal step to be taken, and the interface of what takes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchreg.optim.executors.rounding import Rounding
from torchreg.optim.step_sizes import Group, State, StepSize
from torchreg.penalties import Penalty


@dataclass
class Job:
    """One step of an optimizer with a prox.

    Attributes:
        penalties: by `id`, the penalty of each parameter that has one; None where no prox acts now, because the
            regularizer is disabled or the parameter is frozen.
        step_size: the step of the prox.
        stock: takes the step of the stock class.
        rounding: how weights narrower than float32 are rounded.
    """

    optimizer: Optimizer
    penalties: Mapping[int, Penalty | None]
    step_size: StepSize
    stock: Callable[[Optimizer], Any]
    rounding: Rounding

    @property
    def is_stock(self) -> bool:
        """No strength is above 0: the step is that of the stock class, bit for bit."""
        return all(is_idle(penalty) for penalty in self.penalties.values())

    def carried(self) -> Iterator[tuple[Group, Tensor, Penalty | None]]:
        """The parameters with a penalty, each with its group and the penalty."""
        for group in self.optimizer.param_groups:
            for w in group["params"]:
                if id(w) in self.penalties:
                    yield group, w, self.penalties[id(w)]

    def state_of(self, w: Tensor) -> State:
        """The state of a parameter; an empty dict of its own where it has none, as under SGD without momentum."""
        state: State | None = self.optimizer.state.get(w)
        return {} if state is None else state

    def updated_state_of(self, w: Tensor, skipped: Tensor | None, group: Group) -> State:
        """The state of a parameter after its update, with what the step size tracks in it."""
        # A compiled graph sees what the update has made in the state in this way alone.
        state = self.optimizer.state[w] if torch.compiler.is_compiling() else self.state_of(w)
        self.step_size.after_update(group, state, w, skipped)
        if state and not torch.compiler.is_compiling() and w not in self.optimizer.state:
            self.optimizer.state[w] = state
        return state


class Executor(ABC):
    """One way to take a proximal step: the stock step, then w ← prox(w, s) with s the unit response."""

    @abstractmethod
    def step(self, job: Job) -> bool:
        """Takes the step and returns True; or returns False, and nothing has changed."""


def is_idle(penalty: Penalty | None) -> bool:
    """Nothing is to be applied; a compiled graph, which would be one of that strength, does not look."""
    return penalty is None or (not torch.compiler.is_compiling() and penalty.is_zero)
