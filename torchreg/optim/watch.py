"""A watch over weights that train while the optimizer that carries their penalty does not step."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy


@dataclass
class Record:
    """One parameter as the watch saw it last.

    Attributes:
        version: torch's count of the changes of its memory.
        steps: how many steps of its carrier the watch had noticed.
        trained: a backward pass has given it a gradient since.
        strikes: how many updates in a row were not the carrier's.
        struck_at: `steps` at the last of them.
    """

    version: int
    steps: int
    trained: bool = False
    strikes: int = 0
    struck_at: int = -2


class Watch:
    """Warns once parameters have been updated twice without a step of their carrier: nothing penalizes them then.

    It looks at each parameter in every backward pass, and where `look` is called.

    Args:
        carrier: the attachment, which says `stepped` after each of its steps, and `in_step` within one.
        parameters: those that it carries.
    """

    def __init__(self, carrier: Any, parameters: Iterable[Tensor]) -> None:
        self._carrier = weakref.ref(carrier)  # a hook of a parameter is kept in C++, where a cycle would never end
        self._watched = [w for w in parameters if w.requires_grad and w.is_leaf and not is_lazy(w)]
        self._records = [Record(w._version, 0) for w in self._watched]
        self._steps = 0
        self._hooks = [
            w.register_post_accumulate_grad_hook(functools.partial(_in_backward, weakref.ref(self), record))
            for w, record in zip(self._watched, self._records, strict=True)
        ]
        self._warned = False

    def look(self) -> None:
        """Looks at every parameter now."""
        for w, record in zip(self._watched, self._records, strict=True):
            self.look_at(w, record)

    def look_at(self, w: Tensor, record: Record) -> None:
        """Compares a parameter with its record, and renews that."""
        carrier = self._carrier()
        if carrier is None or carrier.in_step or w.is_inference():
            return
        if carrier.stepped:
            carrier.stepped = False
            self._steps += 1
        steps, version = self._steps, w._version
        if record.trained and version != record.version and steps == record.steps:
            record.strikes = record.strikes + 1 if steps - record.struck_at <= 1 else 1
            record.struck_at = steps
            if record.strikes == 2 and not self._warned and carrier.regularizer.enabled:
                self._warned = True
                kind = type(carrier.optimizer).__name__
                warnings.warn(
                    f"the weights train, but not by the {kind} that carries their penalty, so nothing penalizes them. "
                    f"Step that {kind}; or give the penalty back to the loss, by handle.remove() or "
                    "regularizer.detach(), and add regularizer() to it",
                    stacklevel=4,
                )
        record.version, record.steps, record.trained = version, steps, False

    def remove(self) -> None:
        """Ends the watch."""
        for hook in self._hooks:
            hook.remove()


def _in_backward(reference: weakref.ref[Watch], record: Record, w: Tensor) -> None:
    watch = reference()
    if watch is not None:
        watch.look_at(w, record)
        record.trained = True
