"""Budget: a share of the time, for work that is done again and again."""

from __future__ import annotations

import time


class Budget:
    """Whether work may be done once more, so that all of it takes no more than a share of the time.

    Args:
        share: of the time since now; None is no limit.
        free: so many seconds do not count.

    >>> budget = Budget(0.01)
    >>> budget.allows()
    True
    >>> budget.spend(5.0)  # once more would take as long: not before 1000 seconds have passed
    >>> budget.allows()
    False
    """

    def __init__(self, share: float | None, free: float = 0.0) -> None:
        self._share = share
        self._spent, self._last = -free, 0.0
        self._started = time.perf_counter()

    def allows(self) -> bool:
        """Once more, taking as long as the last time, it would stay within the share."""
        return self._share is None or self._spent + self._last <= self._share * (time.perf_counter() - self._started)

    def spend(self, seconds: float) -> None:
        """It was done, and took so long."""
        self._last = seconds
        self._spent += seconds
