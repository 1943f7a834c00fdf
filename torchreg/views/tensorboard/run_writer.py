"""The writer of one run: each scalar once per step, and no more records after the first error."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchreg.views.tensorboard import records
from torchreg.views.tensorboard.event_file import Sink

_MAX_TEMPLATES = 16


class WarnOnce:
    """Warns at most once about each subject, with the name of the run."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._subjects: set[str] = set()

    def __call__(self, subject: str, message: str) -> None:
        if subject not in self._subjects:
            self._subjects.add(subject)
            warnings.warn(f"TensorBoardMonitor({self._run}): {message}", stacklevel=4)


class RunWriter:
    """Writes the records of a run, and stops with a warning at the first error, so that no error ends a training.

    Errors are handled here and not in the monitor, because processes that gather shards have to go on together.
    """

    def __init__(self, warn: WarnOnce) -> None:
        self._warn = warn
        self._sink: Sink | None = None
        self._last_steps: dict[str, int] = {}  # by tag, the step of its last record
        self._templates: dict[tuple[str, ...], Any] = {}  # by its tags, an event that is filled in again and again

    @property
    def is_open(self) -> bool:
        """Whether records are written: not before `open`, not in processes of another rank, not after an error."""
        return self._sink is not None

    def open(self, opener: Callable[[int], Sink], step: int) -> bool:
        """Opens the file or writer for a first step. Returns whether the directory holds an earlier run."""
        try:
            self._sink = opener(step)
        except Exception as error:
            self.stop(error)
        return getattr(self._sink, "earlier", False)

    def write_scalars(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes one record of all numbers of a step. Numbers whose tag has a record at this step are left out."""
        numbers = {tag: number for tag, number in numbers.items() if self._last_steps.get(tag) != step}
        self._last_steps.update(dict.fromkeys(numbers, step))
        tags = tuple(numbers)
        if not tags or self._sink is None:
            return
        if tags not in self._templates:
            if len(self._templates) == _MAX_TEMPLATES:
                self._templates.clear()
            self._templates[tags] = records.scalars(tags)
        event = self._templates[tags]
        for value, number in zip(event.summary.value, numbers.values(), strict=True):
            value.simple_value = number
        event.step, event.wall_time = step, time.time()
        self._write(event)

    def write_values(self, step: int, values: Sequence[Any]) -> None:
        """Writes one record of images, histograms, texts and the like."""
        self._write(records.event(step, values))

    def restart(self, step: int) -> None:
        """Declares the records from `step` on void."""
        self._last_steps.clear()
        self._write(records.restart(step))

    def flush(self) -> None:
        """Waits until all records are on the disk."""
        self._attempt(lambda sink: sink.flush())

    def close(self) -> None:
        """Closes the file; a SummaryWriter of the user stays open."""
        self._attempt(lambda sink: sink.close())

    def stop(self, error: Exception) -> None:
        """Ends the writing because of an error."""
        sink, self._sink = self._sink, None
        if sink is not None:
            with contextlib.suppress(Exception):
                sink.close()
        self._warn("stopped", f"logging stops here and training goes on: {error_text(error)}")

    def _write(self, event: Any) -> None:
        self._attempt(lambda sink: sink.write(event))

    def _attempt(self, action: Callable[[Sink], Any]) -> None:
        try:
            if self._sink is not None:
                action(self._sink)
        except Exception as error:
            self.stop(error)


def error_text(error: Exception) -> str:
    """The type and the message of an error."""
    return f"{type(error).__name__}: {error}"
