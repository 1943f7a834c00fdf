"""A share of the time, for work that is repeated."""

from __future__ import annotations

import time


class Budget:
    """Decides whether work may be done again, so that all of it takes at most a share of the time.

    Args:
        share: the share of the time since construction; None is no limit.
        free: a number of seconds that do not count.

    >>> budget = Budget(0.01)
    >>> budget.allows()
    True
    >>> budget.spend(5.0)  # the next run would take as long: not before 1000 seconds have passed
    >>> budget.allows()
    False
    """

    def __init__(self, share: float | None, free: float = 0.0) -> None:
        self._share = share
        self._spent, self._last = -free, 0.0
        self._started = time.perf_counter()

    def allows(self) -> bool:
        """Whether one more run, as long as the last one, stays within the share."""
        return self._share is None or self._spent + self._last <= self._share * (time.perf_counter() - self._started)

    def spend(self, seconds: float) -> None:
        """Records the cost of one run."""
        self._last = seconds
        self._spent += seconds
