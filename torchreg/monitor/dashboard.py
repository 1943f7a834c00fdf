"""TensorBoardMonitor: a dashboard of what a regularized network is doing."""

from __future__ import annotations

import contextlib
import importlib.util
import operator
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchreg import checks
from torchreg.certificates import Stationarity
from torchreg.loss import LastLoss
from torchreg.monitor import pictures, summaries, tags, texts
from torchreg.monitor.event_file import BorrowedWriter, EventFile
from torchreg.monitor.layout import FEW, layout
from torchreg.monitor.measurement import NEAR_ZERO, Gauge, read
from torchreg.monitor.pictures import History
from torchreg.monitor.summaries import Hyperparameter
from torchreg.optim.attachment import Attachment
from torchreg.regularizer import Regularizer
from torchreg.zeros import sparsity

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_TAGS = {"loss": "overview/loss", "accuracy": "overview/accuracy", "lr": "schedule/lr"}
_METRICS = {"overview/sparsity": "sparsity", "overview/accuracy": "accuracy", "overview/params_kept": "weights left"}
_FREE_SECONDS = 0.1  # of measuring, before the budget counts: short runs have points too


class TensorBoardMonitor:
    """Logs a regularized training to TensorBoard: sparsity, norms, penalties, masks; open it and see.

    `log` is called in every step, or every epoch, with whatever is at hand. What it is given is written at every
    `every`-th step; the weights are measured (`torchreg.measure`) and drawn as often as the budget allows. The first
    page has sparsity, accuracy, loss and penalty; "Custom Scalars" their trade-off and the layers; "Images" input map,
    masks and filters; "HParams" the strengths beside what they led to; "Text" a summary and a glossary.

    Every record is on its way to the disk when `log` returns. A run that crashed and goes on from a checkpoint in the
    same directory continues its curves: what was logged from the checkpoint's step on is replaced. Logging never stops
    a training: when something goes wrong (the disk is full, a writer is closed), there is one warning.

    Under `torch.distributed` the process of rank 0 writes, and every process calls `log`.

    Args:
        writer: the log directory of this run, or a `torch.utils.tensorboard.SummaryWriter` to write into; for a resumed
            run that one needs its `purge_step`.
        regularizer: what is measured.
        every: write at every so many steps, ≥ 1.
        images_every: draw images and histograms at every so many steps, ≥ 1; None: as the budget allows, and ever less
            often; 0: never.
        budget: the share of the time that measuring may take, and drawing again as much; None is no limit.
        near_zero: what counts as nearly zero, ≥ 0, in units of a weight.
        hparams: more hyperparameters of the run, to stand beside optimizer, learning rate and strengths.
    Raises:
        TypeError: the writer is neither a path nor a SummaryWriter, or the regularizer none.
        ValueError: `every`, `images_every`, `budget` or `near_zero` is out of range, or `hparams` holds more than plain
            numbers, texts and booleans.
        NotADirectoryError: the log directory is a file.
        ImportError: tensorboard is missing.

    >>> model = nn.Linear(3, 2)
    >>> reg = Regularizer(model, L1(1e-3))
    >>> optimizer = tr.optim.ProxAdam(model.parameters(), regularizer=reg)
    >>> with tr.TensorBoardMonitor("runs/l1", reg) as monitor:
    ...     for step in range(100):
    ...         loss = model(torch.ones(4, 3)).square().mean() + reg()
    ...         optimizer.zero_grad(); loss.backward(); optimizer.step()
    ...         monitor.log(step, loss=loss)
    """

    def __init__(
        self,
        writer: str | os.PathLike[str] | SummaryWriter,
        regularizer: Regularizer,
        *,
        every: int = 1,
        images_every: int | None = None,
        budget: float | None = 0.01,
        near_zero: float = NEAR_ZERO,
        hparams: Mapping[str, Hyperparameter] | None = None,
    ) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ImportError(
                "TensorBoardMonitor writes with tensorboard, which is missing; in the checkout: "
                "pip install '.[tensorboard]'"
            )
        if not isinstance(regularizer, Regularizer):
            raise TypeError(
                f"regularizer is a {type(regularizer).__name__}; build one first: Regularizer(model, L1(1e-4))"
            )
        self._regularizer = regularizer
        self._every = _whole("every", every, 1)
        self._images_every = None if images_every is None else _whole("images_every", images_every, 0)
        self._budget = None if budget is None else checks.nonnegative("budget", budget, "pass a share such as 0.01")
        self._near_zero = checks.nonnegative("near_zero", near_zero, "pass what counts as nearly zero, such as 1e-3")
        self._hparams = _hyperparameters(hparams or {})
        self._where, self._open = _opener(writer)
        self._gauge = Gauge(regularizer)
        self._sink: EventFile | BorrowedWriter | None = None
        self._begun = self._closed = self._failed = False
        self._writes = self._measures = self._sharded = False
        self._warned: set[str] = set()
        self._written: dict[str, int] = {}  # the last step of each tag
        self._waiting: dict[str, tuple[int, Any]] = {}  # what came between two multiples of `every`
        self._events: dict[tuple[str, ...], Any] = {}
        self._first_step = self._last_step = 0
        self._measured: int | None = None  # the last step of which the weights were measured
        self._drawn: int | None = None  # and drawn
        self._started = time.perf_counter()
        self._measuring = self._drawing = self._drawing_once = 0.0  # seconds
        self._history = History()

    # ------------------------------------------------------------------ logging

    def log(
        self,
        step: int,
        *,
        loss: float | Tensor | LastLoss | None = None,
        accuracy: float | Tensor | None = None,
        lr: float | Sequence[float] | None = None,
        **values: Any,
    ) -> None:
        """Logs what it is given, and what the weights look like now. Raises nothing.

        Args:
            step: of the training; it grows. One that is smaller than the last means that the run went back to a
                checkpoint: what was logged from there on is replaced.
            loss: a number or a tensor; or `criterion.last` of a RegularizedLoss, which has both parts.
            accuracy: a share.
            lr: the learning rate, or a list of them as schedulers have it; by default the proximal optimizer's.
            values: more numbers and 0-d tensors, or what `torchreg.stationarity` returned. Names without a slash go to
                the first page. What is None is left out.
        """
        try:
            if self._closed:
                self._warn("closed", "it is closed, and what is logged now is lost")
            elif not self._failed or self._sharded:  # processes that gather shards wait for each other
                self._log(int(step), {"loss": loss, "accuracy": accuracy, "lr": lr, **values})
        except Exception as error:
            self._fail(error)

    def flush(self) -> None:
        """Waits until all is written. A monitor with a file of its own has nothing to wait for."""
        try:
            if self._sink is not None:
                self._sink.flush()
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        """Writes what waits, a last measurement, pictures and the summary; a SummaryWriter stays open."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._begun and (not self._failed or self._sharded):
                self._finish(self._last_step)
            if self._sink is not None:
                self._sink.close()
        except Exception as error:
            self._fail(error)

    def __enter__(self) -> TensorBoardMonitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _log(self, step: int, given: Mapping[str, Any]) -> None:
        if not self._begun:
            self._begin(step)
        elif step < self._last_step:
            self._go_back(step)
        self._last_step = step
        numbers: dict[str, float] = {}
        tensors: dict[str, Tensor] = {}
        for tag, value in self._expanded(given):
            if self._due(tag, step):
                self._waiting.pop(tag, None)
                self._take(tag, value, numbers, tensors)
            else:
                self._waiting[tag] = (step, value)
        if self._measures and self._due_to_measure(step):
            numbers = {**numbers, **self._measure(step, tensors)}
        elif tensors:
            found, _ = read(list(tensors.values()))
            numbers.update(zip(tensors, (value for [value] in found), strict=True))
        if numbers:
            self._write(step, numbers)
        if self._measures and self._due_to_draw(step):
            self._draw(step)

    # ------------------------------------------------------------------ what is given

    def _expanded(self, given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """(tag, number or tensor) of all that is given."""
        for name, value in given.items():
            if isinstance(value, Tensor):
                value = value.detach()  # what waits must not hold a graph
            if name == "lr" and value is None:
                value = self._learning_rates()
            if value is None:
                continue
            if isinstance(value, LastLoss):
                yield "overview/loss_data", value._data
                yield "overview/objective", value.total
            elif isinstance(value, Stationarity):
                yield from self._gauge.certified(value).items()
            elif name == "lr" and isinstance(value, (list, tuple)):
                single = len(value) == 1
                yield from ((_TAGS["lr"] if single else f"{_TAGS['lr']}.{i}", rate) for i, rate in enumerate(value))
            else:
                yield _TAGS.get(name) or (tags.safe(name) if "/" in name else f"overview/{tags.safe(name)}"), value

    def _take(self, tag: str, value: Any, numbers: dict[str, float], tensors: dict[str, Tensor]) -> None:
        if isinstance(value, Tensor) and value.numel() == 1:
            tensors[tag] = value.reshape(())
            return
        try:
            numbers[tag] = float(value)
        except (TypeError, ValueError, RuntimeError):
            kind = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            self._warn(tag, f"{tag} is a {kind} and no number, so it is left out")

    def _due(self, tag: str, step: int) -> bool:
        written = self._written.get(tag)
        return written is None or step // self._every != written // self._every

    def _learning_rates(self) -> list[float]:
        rates = [float(group["lr"]) for optimizer in self._optimizers() for group in optimizer.param_groups]
        return rates[:1] if len(set(rates)) == 1 else rates

    def _optimizers(self) -> list[Optimizer]:
        """The proximal optimizers that carry the regularizer."""
        routes = [route for route in self._regularizer._live_routes() if isinstance(route, Attachment)]
        return [optimizer for route in routes if (optimizer := route._optimizer()) is not None]

    # ------------------------------------------------------------------ the weights

    def _due_to_measure(self, step: int) -> bool:
        if self._measured is not None and step // self._every == self._measured // self._every:
            return False
        return self._within_budget(self._measuring - _FREE_SECONDS)

    def _due_to_draw(self, step: int) -> bool:
        if self._images_every == 0 or self._drawn == step:
            return False
        if self._drawn is None:
            return True
        if self._images_every is not None:
            return step // self._images_every != self._drawn // self._images_every
        further = step - self._first_step >= 1.25 * (self._drawn - self._first_step) + self._every
        return further and self._within_budget(self._drawing + self._drawing_once)

    def _within_budget(self, seconds: float) -> bool:
        # Processes that gather shards have to agree on when to do so, and their clocks do not.
        if self._budget is None or self._sharded:
            return True
        return seconds <= self._budget * (time.perf_counter() - self._started)

    def _measure(self, step: int, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """The numbers of the weights and of `tensors`, in one read of each device."""
        started = time.perf_counter()
        numbers, also = self._gauge.read(self._near_zero, list(tensors.values()))
        self._measuring += time.perf_counter() - started - self._gauge.waited
        self._measured = step
        self._history.add(step, numbers)
        return {**dict(zip(tensors, also, strict=True)), **numbers}

    def _draw(self, step: int) -> None:
        started = time.perf_counter()
        self._drawn = step
        values = list(pictures.pictures(self._gauge.entries(), self._gauge.tags))
        if len(self._gauge.tags) > FEW and self._writes and importlib.util.find_spec("matplotlib"):
            values.append(summaries.figure("weight_masks/sparsity_of_all_layers", self._history.figure()))
        self._add(step, values)
        self._drawing_once = time.perf_counter() - started
        self._drawing += self._drawing_once

    # ------------------------------------------------------------------ writing

    def _begin(self, step: int) -> None:
        self._begun, self._first_step = True, step
        self._sharded = any(hasattr(w, "full_tensor") for _, w in self._regularizer.named_parameters())
        self._writes = not _is_other_rank()
        self._measures = self._writes or self._sharded
        if self._writes:
            self._sink = self._open(step)
            terms = list(self._gauge.terms.values())
            values = [
                summaries.layout(layout(list(self._gauge.tags.values()), terms, self._gauge.strengths())),
                summaries.text("about/3_glossary", texts.glossary(self._near_zero)),
                summaries.text("about/2_regularizer", f"```\n{self._regularizer.explain()}\n```"),
                *summaries.hyperparameters(self._where, self._all_hyperparameters(), _METRICS),
            ]
            self._add(step, values)

    def _finish(self, step: int) -> None:
        """The end of a run: its last state, so that no curve stops short."""
        for tag, (when, value) in self._waiting.items():
            numbers: dict[str, float] = {}
            tensors: dict[str, Tensor] = {}
            self._take(tag, value, numbers, tensors)
            self._write(when, {**numbers, **{tag: float(tensor) for tag, tensor in tensors.items()}})
        if self._measures and self._measured != step:
            self._write(step, self._measure(step, {}))
        if self._measures and self._images_every != 0 and self._drawn != step:
            self._draw(step)
        if self._measures:
            found = sparsity(self._regularizer)
            self._add(step, [summaries.text("about/1_summary", texts.summary(found)), summaries.end()])

    def _go_back(self, step: int) -> None:
        """The run went back to a checkpoint: what was written from `step` on does not hold any more."""
        self._warn(
            "back",
            f"step {step} was logged after step {self._last_step}, so what was logged from {step} on is replaced. If "
            "the training did not go back to a checkpoint, log a step that grows through all epochs",
        )
        if self._sink is not None:
            self._sink.void(step)
        self._written.clear()
        self._waiting.clear()
        self._measured = self._drawn = None
        self._first_step = min(step, self._first_step)
        self._history.cut(step)

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        """One record for all numbers of a step."""
        self._written.update(dict.fromkeys(numbers, step))
        if self._sink is None:
            return
        key = tuple(numbers)
        if key not in self._events:
            if len(self._events) == 16:
                self._events.clear()
            self._events[key] = summaries.scalars(key)
        event = self._events[key]
        for value, number in zip(event.summary.value, numbers.values(), strict=True):
            value.simple_value = number
        event.step, event.wall_time = step, time.time()
        self._sink.write(event)

    def _add(self, step: int, values: Sequence[Any]) -> None:
        if self._sink is not None:
            self._sink.write(summaries.event(step, time.time(), values))

    def _fail(self, error: Exception) -> None:
        """Logging is over: one warning, and the training goes on."""
        sink, self._sink, self._failed = self._sink, None, True
        if sink is not None:
            with contextlib.suppress(Exception):
                sink.close()
        self._warn("failed", f"logging stops here and training goes on: {type(error).__name__}: {error}")

    def _warn(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(f"TensorBoardMonitor({self._where}): {message}", stacklevel=4)

    def _all_hyperparameters(self) -> dict[str, Hyperparameter]:
        found: dict[str, Hyperparameter] = {}
        if optimizers := self._optimizers():
            found["optimizer"] = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            found["lr"] = self._learning_rates()[0]
        for key, tag in self._gauge.terms.items():
            strengths = self._regularizer[key].strengths
            for name, strength in strengths.items():
                found[f"lambda_{tag}" if len(strengths) == 1 else f"lambda_{tag}.{name}"] = strength
        return {**found, **self._hparams}


def _opener(writer: str | os.PathLike[str] | SummaryWriter) -> tuple[str, Callable[[int], EventFile | BorrowedWriter]]:
    """What the writer is called, and how it is opened at the first step."""
    if isinstance(writer, (str, os.PathLike)) and "://" not in os.fspath(writer):
        folder = Path(writer)
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; pass a directory for the logs of this run, such as runs/l1")
        return str(folder), lambda step: EventFile(folder, step)
    from torch.utils.tensorboard import SummaryWriter

    if isinstance(writer, (str, os.PathLike)):  # a bucket, which TensorBoard's own writer knows how to reach
        address = os.fspath(writer)
        return address, lambda step: BorrowedWriter(SummaryWriter(address, purge_step=step))
    if isinstance(writer, SummaryWriter):
        return str(writer.log_dir), lambda step: BorrowedWriter(writer)
    raise TypeError(
        f"writer is a {type(writer).__module__}.{type(writer).__qualname__}; pass a log directory such as runs/l1, or "
        "a torch.utils.tensorboard.SummaryWriter. Any other logger takes the numbers: log(torchreg.measure(reg))"
    )


def _is_other_rank() -> bool:
    """Another process than the one of rank 0, which writes."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0


def _whole(name: str, value: object, least: int) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass a whole number of steps") from None
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name}={value!r} must be at least {least}; pass a whole number of steps")
    return number


def _hyperparameters(values: Mapping[str, Any]) -> dict[str, Hyperparameter]:
    if not isinstance(values, Mapping):
        raise TypeError(f'hparams is a {type(values).__name__}; pass a dict: hparams={{"width": 300}}')
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, (bool, int, float, str)):
            raise ValueError(
                f"hparams[{name!r}]={value!r} is a {type(value).__name__}; give names to plain numbers, texts and "
                "booleans: .item() or str() makes one"
            )
    return dict(values)
