"""The agenda of a monitor: which values, measurements and pictures are due at a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchreg.views.tensorboard.budget import Budget

_FREE_SECONDS = 0.02  # of measuring, before the budget counts, so that short runs have points too


class Agenda:
    """Decides what is due at a step. A value is due when a multiple of `every` was reached since it was last due.

    Args:
        every: the number of steps between two records of a value or a measurement.
        images_every: the number of steps between pictures; 0: never; None: increasingly rarely, within the budget.
        budget: the share of the time for measuring and drawing, half of it for each; None is no limit.
    Attributes:
        postponed: by name, the step and the value that were not due since the last value that was.
        measuring, drawing: the budgets of both.
        bound_by_steps: whether the steps alone decide and the budgets do not, so that processes that gather shards
            decide alike.

    >>> agenda = Agenda(every=10, images_every=0, budget=None)
    >>> [step for step in (3, 7, 10, 15, 31) if agenda.due_values(step, {"loss": 0.5})]
    [3, 10, 31]
    """

    def __init__(self, every: int, images_every: int | None, budget: float | None) -> None:
        self._every, self._images_every = every, images_every
        share = None if budget is None else budget / 2
        self.measuring, self.drawing = Budget(share, free=_FREE_SECONDS), Budget(share)
        self.bound_by_steps = False
        self.postponed: dict[str, tuple[int, Any]] = {}
        self._first_step = 0
        self._value_steps: dict[str, int] = {}  # by name, the step at which a value was last due
        self._measured_step: int | None = None
        self._drawn_step: int | None = None

    def start(self, step: int) -> None:
        """Begins the run at `step`."""
        self._first_step = step

    def go_back(self, step: int) -> None:
        """Forgets the steps from `step` on. Everything is due again.

        A reader without support for restarts drops old points only before the next point of the same tag.
        """
        self._value_steps.clear()
        self.postponed = {name: item for name, item in self.postponed.items() if item[0] < step}
        self._measured_step = self._drawn_step = None
        self._first_step = min(step, self._first_step)

    def due_values(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values that are due; the others are postponed."""
        due = {}
        for name, value in values.items():
            if self._reached(step, self._value_steps.get(name)):
                self.postponed.pop(name, None)
                self._value_steps[name] = step
                due[name] = value
            else:  # a copy without its graph, since running sums change in place
                self.postponed[name] = (step, value.detach().clone() if isinstance(value, Tensor) else value)
        return due

    def measurement_is_due(self, step: int) -> bool:
        return self._reached(step, self._measured_step) and (self.bound_by_steps or self.measuring.allows())

    def pictures_are_due(self, step: int) -> bool:
        if not self.draws:
            return False
        if self._images_every is not None:
            return self._reached(step, self._drawn_step, self._images_every)
        if self._drawn_step is None:
            return True
        rarer = step - self._first_step >= 1.25 * (self._drawn_step - self._first_step) + self._every
        return rarer and (self.bound_by_steps or self.drawing.allows())

    @property
    def draws(self) -> bool:
        """Whether pictures are wanted at all."""
        return self._images_every != 0

    def was_measured(self, step: int) -> bool:
        return self._measured_step == step

    def was_drawn(self, step: int) -> bool:
        return self._drawn_step == step

    def note_measurement(self, step: int) -> None:
        """Records that the weights were measured at `step`."""
        self._measured_step = step

    def note_pictures(self, step: int) -> None:
        """Records that pictures were drawn at `step`."""
        self._drawn_step = step

    def _reached(self, step: int, last: int | None, every: int | None = None) -> bool:
        """Whether a multiple of `every` was reached or skipped since the step `last`."""
        every = every or self._every
        return last is None or step // every != last // every
