"""TensorBoardMonitor: a dashboard of what a regularized network is doing."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchreg._checks import nonnegative, whole_number
from torchreg._distributed import is_sharded, unsharded
from torchreg._tables import printable
from torchreg.binding.loss import LastLoss
from torchreg.binding.regularizer import Regularizer
from torchreg.inspection.certificates import Stationarity
from torchreg.inspection.zero_counts import sparsity
from torchreg.optim.attachment import carriers
from torchreg.views import tags
from torchreg.views.measurement import NEAR_ZERO, Gauge
from torchreg.views.reading import read
from torchreg.views.tensorboard import pictures, records, texts
from torchreg.views.tensorboard.budget import Budget
from torchreg.views.tensorboard.event_file import Sink, opener
from torchreg.views.tensorboard.layout import FEW, layout
from torchreg.views.tensorboard.pictures import History
from torchreg.views.tensorboard.records import Hyperparameter

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_TAGS = {"loss": "overview/loss", "accuracy": "overview/accuracy", "lr": "schedule/lr"}
_METRICS = {"overview/sparsity": "sparsity", "overview/accuracy": "accuracy", "overview/params_kept": "weights left"}
_FREE_SECONDS = 0.02  # of measuring, before the budget counts: short runs have points too


class TensorBoardMonitor:
    """Logs a regularized training to TensorBoard: sparsity, norms, penalties, masks; open it and see.

    `log` is called in every step, or every epoch, with whatever is at hand. Each name is written again when a multiple
    of `every` has come since it was last; what comes between is not, but for the last of it, which `close` writes. The
    weights are measured (`torchreg.measure`) as rarely, and no more often than the budget allows.

    The first page has sparsity, accuracy, loss and penalty; "Custom Scalars" their trade-off and the layers; "Images"
    input map, masks and filters; "HParams" the strengths beside what they led to; "Text" a summary and a glossary.

    Every record is on its way to the disk when `log` returns. A run that crashed and goes on from a checkpoint in the
    same directory continues its curves: what was logged from the checkpoint's step on is replaced. Logging never stops
    a training: when something goes wrong (the disk is full, a writer is closed), there is one warning.

    Under `torch.distributed` the process of rank 0 writes, and every process calls `log`.

    Args:
        writer: the log directory of this run, which has no other monitor, or a
            `torch.utils.tensorboard.SummaryWriter` to write into; in a resumed run that one needs its `purge_step`.
        regularizer: what is measured.
        every: write at every so many steps, ≥ 1. Writing what stands on a GPU waits for it.
        images_every: draw images and histograms at every so many steps, ≥ 1; None: as the budget allows, and ever less
            often; 0: never.
        budget: the share of the time that measuring and drawing may take, a half each; None is no limit. Sharded
            weights, which all processes gather together, are measured at every `every`-th step.
        near_zero: what counts as nearly zero, ≥ 0, in units of a weight.
        hparams: more hyperparameters of the run, to stand beside optimizer, learning rate and strengths.
    Raises:
        TypeError: the writer is neither a path nor a SummaryWriter, or the regularizer none.
        ValueError: `every`, `images_every`, `budget` or `near_zero` is out of range, or `hparams` holds more than plain
            numbers, texts and booleans.
        NotADirectoryError, PermissionError: there is no making the log directory.
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
        self._every = whole_number("every", every)
        self._images_every = None if images_every is None else whole_number("images_every", images_every, 0)
        if budget is not None:
            budget = nonnegative("budget", budget, "pass a share such as 0.01")
        self._near_zero = nonnegative("near_zero", near_zero, "pass what counts as nearly zero, such as 1e-3")
        self._hparams = _hyperparameters(hparams or {})
        self._where, self._open = opener(writer)
        self._sink: Sink | None = None  # none in processes of another rank, nor once writing failed
        self._gauge: Gauge | None = None  # none before the first step, nor once the weights cannot be measured
        self._sharded = self._closed = False
        self._warned: set[str] = set()
        self._written: dict[str, int] = {}  # the last step of each tag
        self._given: dict[str, int] = {}  # by the names that `log` is given, the last step that was written
        self._waiting: dict[str, tuple[int, Any]] = {}  # what came between two multiples of `every`
        self._own: frozenset[str] = frozenset()  # the tags of what is measured
        self._events: dict[tuple[str, ...], Any] = {}
        self._first_step = 0
        self._last_step: int | None = None
        self._measured: int | None = None  # the last step of which the weights were measured
        self._drawn: int | None = None  # and drawn
        half = None if budget is None else budget / 2
        self._measuring, self._drawing = Budget(half, free=_FREE_SECONDS), Budget(half)
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
            step: of the training, one count for all that is logged; it grows. One that is smaller than the last means
                that the run went back to a checkpoint: what was logged from there on is replaced.
            loss: of this step, a number or a tensor; or `criterion.last` of a RegularizedLoss, which has both parts.
            accuracy: a share, 0 to 1.
            lr: the learning rate, or a list of them as schedulers have it; by default the proximal optimizer's, of each
                parameter group.
            values: more numbers and 0-d tensors, or what `torchreg.stationarity` returned. Names without a slash go to
                the first page. What is None is left out.
        """
        try:
            if self._closed:
                self._warn("closed", "it is closed, and what is logged now is lost")
            elif (number := _step(step)) is None:
                self._warn("step", f"step={step!r} is no whole number ≥ 0, and what is logged with it is lost")
            else:
                self._log(number, {"loss": loss, "accuracy": accuracy, "lr": lr, **values})
        except Exception as error:
            if self._last_step is None:  # the next call may begin: by then a lazy module has its shape
                self._warn("not begun", f"nothing is logged before this is put right: {_told(error)}")
            else:
                self._stop(error)

    def flush(self) -> None:
        """Waits until all is written. A monitor with a file of its own has nothing to wait for."""
        try:
            if self._sink is not None:
                self._sink.flush()
        except Exception as error:
            self._stop(error)

    def close(self) -> None:
        """Writes what waits, a last measurement, pictures and the summary; a SummaryWriter stays open."""
        self._close(finish=True)

    def __enter__(self) -> TensorBoardMonitor:
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        # A process that fails alone must not wait for the others to gather their shards.
        self._close(finish=error is None or not self._sharded, failed=error is not None)

    def _close(self, finish: bool, failed: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if finish and self._at_work and self._last_step is not None:
                self._finish(self._last_step, failed)
            if self._sink is not None:
                self._sink.close()
        except Exception as error:
            self._stop(error)

    def _log(self, step: int, given: Mapping[str, Any]) -> None:
        if self._last_step is None:
            self._begin(step)
        elif step < self._last_step:
            self._go_back(step, self._last_step)
        self._last_step = step
        if not self._at_work:
            return
        due = {}
        for name, value in given.items():
            if value is None and name != "lr":
                continue
            if _due(step, self._given.get(name), self._every):
                self._waiting.pop(name, None)
                self._given[name] = step
                due[name] = value
            else:  # a copy without its graph: running sums change in place
                self._waiting[name] = (step, value.detach().clone() if isinstance(value, Tensor) else value)
        numbers, tensors = self._taken(due)
        if _due(step, self._measured, self._every) and (self._sharded or self._measuring.allows()):
            with self._looking():
                numbers |= self._measure(step, tensors)
        numbers |= _read(tensors)
        self._write(step, numbers)
        if numbers.get(_TAGS["accuracy"], 0) > 1:
            self._warn("accuracy", "accuracy is a share, and is drawn beside sparsity: log 0.92 for 92%")
        if self._due_to_draw(step):
            with self._looking():
                self._draw(step)

    @property
    def _at_work(self) -> bool:
        """It writes, or gathers shards with the process that does."""
        return self._sink is not None or self._sharded

    # ------------------------------------------------------------------ what is given

    def _expanded(self, given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """(tag, value) of all that is given, without graphs."""
        for name, value in given.items():
            if name == "lr" and value is None:
                groups = [group for optimizer in self._optimizers() for group in optimizer.param_groups]
                value = [group["lr"] for group in groups if "lr" in group]
            if isinstance(value, LastLoss):
                yield "overview/loss_data", value._data
                yield "overview/objective", value.total
            elif isinstance(value, Stationarity):
                try:
                    found = {} if self._gauge is None else self._gauge.certified(value)
                except ValueError as error:
                    self._warn(name, f"{name} is left out: {error}")
                else:
                    yield from found.items()
            elif name == "lr" and isinstance(value, (list, tuple)):
                ends = [""] if len(value) == 1 else [f".{i}" for i in range(len(value))]
                yield from ((_TAGS["lr"] + end, rate) for end, rate in zip(ends, value, strict=True))
            elif value is not None:
                tag = _TAGS.get(name) or tags.safe(name)
                tag = tag if "/" in tag else f"overview/{tag}"
                if tag in self._own:
                    self._warn(tag, f"{tag} is measured, so the logged one is left out; give it another name")
                else:
                    yield tag, value.detach() if isinstance(value, Tensor) else value

    def _taken(self, given: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The numbers among what is given, by tag, and those that are still on a device."""
        numbers: dict[str, float] = {}
        tensors: dict[str, Tensor] = {}
        for tag, value in self._expanded(given):
            try:
                if isinstance(value, Tensor) and value.numel() == 1 and not (value.is_complex() or value.is_meta):
                    value = unsharded(value)
                    if not value.is_cpu:
                        tensors[tag] = value.reshape(())
                        continue
                numbers[tag] = float(value.item() if hasattr(value, "item") else value)
            except Exception:  # whatever an object of the user's raises
                kind = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                self._warn(tag, f"{tag} is a {kind} and no number, so it is left out; log a number or a 0-d tensor")
        return numbers, tensors

    def _optimizers(self) -> list[Optimizer]:
        """The proximal optimizers that carry the regularizer."""
        return [carrier.optimizer for carrier in carriers(self._regularizer)]

    # ------------------------------------------------------------------ the weights

    def _due_to_draw(self, step: int) -> bool:
        if self._images_every == 0:
            return False
        if self._images_every is not None or self._drawn is None:
            return _due(step, self._drawn, self._images_every or 1)
        further = step - self._first_step >= 1.25 * (self._drawn - self._first_step) + self._every
        return further and (self._sharded or self._drawing.allows())

    def _measure(self, step: int, tensors: dict[str, Tensor]) -> dict[str, float]:
        """The numbers of the weights and of `tensors`, which it empties, in one read of each device."""
        if self._gauge is None:
            return {}
        started = time.thread_time()  # not of the wall: what others take on a busy machine is not its own
        numbers, also = self._gauge.read(self._near_zero, list(tensors.values()))
        for name, message in self._gauge.broken.items():
            self._warn(name, message)
        self._measuring.spend(time.thread_time() - started - self._gauge.waited)
        self._measured, self._own = step, frozenset(numbers)
        self._history.add(step, numbers)
        numbers.update(zip(tensors, also, strict=True))
        tensors.clear()
        return numbers

    def _draw(self, step: int) -> None:
        if self._gauge is None:
            return
        started = time.thread_time()
        self._drawn = step
        values = list(pictures.pictures(self._gauge.entries(), self._gauge.tags))
        if self._sink is not None and len(self._gauge.tags) > FEW and importlib.util.find_spec("matplotlib"):
            # Here alone one process does what the others do not: it must not miss the next gathering of shards.
            try:
                values += [records.figure("weight_masks/sparsity_of_all_layers", f) for f in self._history.figures()]
            except Exception as error:
                self._warn("figure", f"the sparsity of all layers is not drawn: {_told(error)}")
        self._add(step, values)
        self._drawing.spend(time.thread_time() - started)

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        """Around what looks at the weights: where it fails, as where a module was replaced, the rest goes on."""
        try:
            yield
        except Exception as error:
            self._gauge = None
            self._warn("measured", f"measuring the weights stops here, all else goes on: {_told(error)}")

    # ------------------------------------------------------------------ writing

    def _begin(self, step: int) -> None:
        self._first_step = step
        self._gauge = Gauge(self._regularizer)
        self._sharded = any(is_sharded(w) for _, w in self._regularizer.named_parameters())
        if _is_other_rank():
            return
        try:
            self._sink = self._open(step)
            if step <= 1 and getattr(self._sink, "earlier", False):
                self._warn(
                    "earlier",
                    f"there is an earlier run in this directory, and its points from step {step} on are replaced; log "
                    "into another one to keep both",
                )
            values = [
                records.layout(layout(list(self._gauge.tags.values()))),
                records.text("about/3_glossary", texts.glossary(self._near_zero)),
                records.text("about/2_regularizer", texts.regularizer(self._regularizer)),
                *records.hyperparameters(printable(self._where, 1000), self._all_hyperparameters(), _METRICS),
            ]
            self._add(step, values)
        except Exception as error:
            self._stop(error)

    def _finish(self, step: int, failed: bool) -> None:
        """The end of a run: its last state, so that no curve stops short."""
        for name, (when, value) in self._waiting.items():
            numbers, tensors = self._taken({name: value})
            self._write(when, numbers | _read(tensors))
        with self._looking():
            if self._measured != step:
                self._write(step, self._measure(step, {}))
            if self._drawn != step and self._images_every != 0:
                self._draw(step)
            if self._gauge is not None:
                self._add(step, [records.text("about/1_summary", texts.summary(sparsity(self._regularizer)))])
        self._add(step, [records.end(failed)])

    def _go_back(self, step: int, last: int) -> None:
        """The run went back to a checkpoint: what was written from `step` on does not hold any more."""
        self._warn(
            "back",
            f"step {step} was logged after step {last}, so what was logged from {step} on is replaced. If the training "
            "did not go back to a checkpoint, log a step that grows through all epochs",
        )
        self._emit(records.restart(step))
        # All is due at once: a reader that knows no restarts drops what is not before the next point of a tag.
        self._written.clear()
        self._given.clear()
        self._waiting = {name: item for name, item in self._waiting.items() if item[0] < step}
        self._measured = self._drawn = None
        self._first_step = min(step, self._first_step)
        self._history.cut(step)

    def _write(self, step: int, numbers: Mapping[str, float]) -> None:
        """One record for all numbers of a step."""
        numbers = {tag: number for tag, number in numbers.items() if self._written.get(tag) != step}  # each once
        self._written.update(dict.fromkeys(numbers, step))
        key = tuple(numbers)
        if not key or self._sink is None:
            return
        if key not in self._events:
            if len(self._events) == 16:
                self._events.clear()
            self._events[key] = records.scalars(key)
        event = self._events[key]
        for value, number in zip(event.summary.value, numbers.values(), strict=True):
            value.simple_value = number
        event.step, event.wall_time = step, time.time()
        self._emit(event)

    def _add(self, step: int, values: Sequence[Any]) -> None:
        self._emit(records.event(step, values))

    def _emit(self, event: Any) -> None:
        # Caught here and not further up: processes that gather shards must not miss one another.
        try:
            if self._sink is not None:
                self._sink.write(event)
        except Exception as error:
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        """Writing is over: one warning, and the training goes on."""
        sink, self._sink = self._sink, None
        if sink is not None:
            with contextlib.suppress(Exception):
                sink.close()
        self._warn("stopped", f"logging stops here and training goes on: {_told(error)}")

    def _warn(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(f"TensorBoardMonitor({self._where}): {message}", stacklevel=4)

    def _all_hyperparameters(self) -> dict[str, Hyperparameter]:
        found: dict[str, Hyperparameter] = {}
        if optimizers := self._optimizers():
            found["optimizer"] = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            group = optimizers[0].param_groups[0]
            # A scheduler's own: the peak of OneCycleLR, where others begin.
            rate = group.get("max_lr", group.get("initial_lr", group.get("lr")))
            if rate is not None:
                found["lr"] = float(rate)
        terms = self._regularizer.terms
        for key, term in terms.items():
            for name, strength in term.strengths.items():
                label = key if len(term.strengths) == 1 else f"{key}.{name}"
                if len(terms) == 1 and len(term.strengths) > 1:
                    label = name  # the λ₁ of an elastic net stands in one column with the λ of L1
                found[f"lambda_{printable(label)}"] = strength
        return {**found, **self._hparams}


def _due(step: int, last: int | None, every: int) -> bool:
    """A multiple of `every` has come, or been jumped over, since the last time."""
    return last is None or step // every != last // every


def _read(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    found, _ = read(list(tensors.values()))
    return {tag: value for tag, [value] in zip(tensors, found, strict=True)}


def _step(value: Any) -> int | None:
    """A whole number ≥ 0, of whatever type: `step=epoch * 1.0` and a counter on the CPU will do."""
    try:
        return int(value) if value == int(value) >= 0 else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _is_other_rank() -> bool:
    """Another process than the one of rank 0, which writes."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_rank() != 0


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
