"""How the benchmarks time: the variants take turns in one process, and a figure is a ratio of neighbours."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

Quartiles = tuple[float, float, float]


def take_turns(variants: dict[str, Callable[[], None]], seconds: float, threads: int) -> dict[str, list[float]]:
    """The time of each variant in every turn; the first two turns, which build states and caches, do not count.

    One thread is timed by its own processor time, which other programs on the machine disturb least; several by the
    clock.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in variants}
    end, turn = time.perf_counter() + seconds, 0
    while turn < 7 or time.perf_counter() < end:
        for name, run in variants.items():
            start = clock()
            run()
            if turn > 1:
                times[name].append(clock() - start)
        turn += 1
    os.environ.pop("TORCHREG_BACKEND", None)
    return times


def forced(backend: str, run: Callable[[], Any]) -> Callable[[], None]:
    """A variant that one backend serves; to be timed by `take_turns`, which leaves the choice open again."""

    def go() -> None:
        os.environ["TORCHREG_BACKEND"] = backend
        run()

    return go


def ratios(times: dict[str, list[float]], base: str) -> dict[str, Quartiles]:
    """First quartile, median and third quartile of each variant over its neighbour in the same turn."""
    found = {}
    for name in times:
        if name != base:
            turns = [a / b for a, b in zip(times[name], times[base], strict=True)]
            low, middle, high = statistics.quantiles(turns, n=4)
            found[name] = (low, middle, high)
    return found


def cell(found: dict[str, Quartiles], name: str) -> str:
    """The median and the quartiles as a table has them."""
    return "{1:.2f} ({0:.2f}, {2:.2f})".format(*found[name]) if name in found else "not built"
