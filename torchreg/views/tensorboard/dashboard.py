"""TensorBoardMonitor: a dashboard of a regularized training."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
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
from torchreg.views.tensorboard.agenda import Agenda
from torchreg.views.tensorboard.event_file import opener
from torchreg.views.tensorboard.layout import MAX_LINES, layout
from torchreg.views.tensorboard.pictures import History
from torchreg.views.tensorboard.records import Hyperparameter
from torchreg.views.tensorboard.run_writer import RunWriter, WarnOnce, error_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_TAGS = {"loss": "overview/loss", "accuracy": "overview/accuracy", "lr": "schedule/lr"}
_METRICS = {"overview/sparsity": "sparsity", "overview/accuracy": "accuracy", "overview/params_kept": "weights left"}


class TensorBoardMonitor:
    """Logs a regularized training to TensorBoard: sparsity, norms, penalties, masks.

    Call `log` in every step or every epoch, with any values you have. A value is written again when a multiple of
    `every` was reached since it was last written; values in between are dropped, except for the last one, which `close`
    writes. The weights are measured (`torchreg.measure`) as rarely, and no more often than the budget allows.

    The first page has sparsity, accuracy, loss and penalty; "Custom Scalars" their trade-off and the layers; "Images"
    input map, masks and filters; "HParams" the strengths and the results; "Text" a summary and a glossary.

    The operating system has every record when `log` returns. A run that crashed and goes on from a checkpoint in the
    same directory continues its curves: the records from the step of the checkpoint on are replaced. Logging never
    stops a training: after an error (the disk is full, a writer is closed) there is one warning.

    Under `torch.distributed` the process of rank 0 writes, and every process calls `log`.

    Args:
        writer: the log directory of this run, which has no other monitor, or a
            `torch.utils.tensorboard.SummaryWriter` to write into; in a resumed run the SummaryWriter needs its
            `purge_step`.
        regularizer: the regularizer whose parameters are measured.
        every: the number of steps between two records, ≥ 1. Writing a value that is on a GPU waits for the GPU.
        images_every: the number of steps between images and histograms, ≥ 1; None: increasingly rarely, within the
            budget; 0: never.
        budget: the share of the time for measuring and drawing, half of it for each; None is no limit. Sharded weights,
            which all processes gather together, are measured every `every` steps.
        near_zero: the largest magnitude that counts as nearly zero, ≥ 0, in units of a weight.
        hparams: more hyperparameters of the run, which are shown with optimizer, learning rate and strengths.
    Raises:
        TypeError: `writer` is neither a path nor a SummaryWriter, or `regularizer` is not a Regularizer.
        ValueError: `every`, `images_every`, `budget` or `near_zero` is out of range, or `hparams` has a value that is
            not a plain number, a text or a boolean.
        NotADirectoryError, PermissionError: the log directory cannot be created.
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
        every = whole_number("every", every)
        images_every = None if images_every is None else whole_number("images_every", images_every, 0)
        budget = None if budget is None else nonnegative("budget", budget, "pass a share such as 0.01")
        self._near_zero = nonnegative("near_zero", near_zero, "pass a magnitude such as 1e-3")
        self._hparams = _checked_hyperparameters(hparams or {})
        self._name, self._open = opener(writer)
        self._agenda = Agenda(every, images_every, budget)
        self._warn = WarnOnce(self._name)
        self._writer = RunWriter(self._warn)
        self._history = History()
        self._gauge: Gauge | None = None  # None before the first step, and after the weights could not be measured
        self._measured_tags: frozenset[str] = frozenset()
        self._last_step: int | None = None
        self._sharded = self._closed = False

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
        """Logs these values, and the state of the weights. It raises no errors.

        Args:
            step: the step of the training, in one count for all values, which increases. A smaller step than the last
                one means that the run went back to a checkpoint: the records from this step on are replaced.
            loss: the loss of this step, a number or a tensor; or `criterion.last` of a RegularizedLoss, which has both
                parts.
            accuracy: a share, 0 to 1.
            lr: the learning rate, or a list as schedulers return it; by default that of the proximal optimizer, for
                each parameter group.
            values: more numbers and 0-d tensors, or the result of `torchreg.stationarity`. Names without a slash are
                on the first page. Values of None are left out.
        """
        try:
            if self._closed:
                self._warn("closed", "the monitor is closed, and values logged now are lost")
            elif (number := _step_number(step)) is None:
                self._warn("step", f"step={step!r} is not a whole number ≥ 0, and its values are lost")
            else:
                self._log(number, {"loss": loss, "accuracy": accuracy, "lr": lr, **values})
        except Exception as error:
            if self._last_step is None:  # the next call may succeed, when a lazy module has its shape
                self._warn("not begun", f"nothing is logged before this is fixed: {error_text(error)}")
            else:
                self._writer.stop(error)

    def flush(self) -> None:
        """Waits until all records are written. A monitor with its own file has nothing to wait for."""
        self._writer.flush()

    def close(self) -> None:
        """Writes postponed values, a last measurement, pictures and the summary; a SummaryWriter stays open."""
        self._close(finish=True)

    def __enter__(self) -> TensorBoardMonitor:
        return self

    def __exit__(self, error: type[BaseException] | None, *details: object) -> None:
        # A process that fails alone must not wait for the others to gather their shards.
        self._close(finish=error is None or not self._sharded, failed=error is not None)

    def _close(self, finish: bool, failed: bool = False) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            if finish and self._is_active and self._last_step is not None:
                self._finish(self._last_step, failed)
        except Exception as error:
            self._writer.stop(error)
        self._writer.close()

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        if self._last_step is None:
            self._begin(step)
        elif step < self._last_step:
            self._go_back(step, self._last_step)
        self._last_step = step
        if not self._is_active:
            return
        present = {name: value for name, value in values.items() if value is not None or name == "lr"}
        numbers, tensors = self._numbers(self._agenda.due_values(step, present))
        if self._agenda.measurement_is_due(step):
            with self._measuring():
                numbers |= self._measure(step, tensors)
        numbers |= _read(tensors)
        self._writer.write_scalars(step, numbers)
        if numbers.get(_TAGS["accuracy"], 0) > 1:
            self._warn("accuracy", "accuracy must be a share, since its charts also show sparsity: log 0.92 for 92%")
        if self._agenda.pictures_are_due(step):
            with self._measuring():
                self._draw(step)

    @property
    def _is_active(self) -> bool:
        """Whether this process writes, or gathers shards together with the process that writes."""
        return self._writer.is_open or self._sharded

    # ------------------------------------------------------------------ values

    def _tagged(self, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """(tag, value) of all values, without graphs; a loss or a certificate has several parts."""
        for name, value in values.items():
            if name == "lr" and value is None:
                groups = [group for optimizer in self._optimizers() for group in optimizer.param_groups]
                value = [group["lr"] for group in groups if "lr" in group]
            if isinstance(value, LastLoss):
                yield "overview/loss_data", value.on_device
                yield "overview/objective", value.total
            elif isinstance(value, Stationarity):
                try:
                    numbers = {} if self._gauge is None else self._gauge.certificate_numbers(value)
                except ValueError as error:
                    self._warn(name, f"{name} is left out: {error}")
                else:
                    yield from numbers.items()
            elif name == "lr" and isinstance(value, (list, tuple)):
                ends = [""] if len(value) == 1 else [f".{i}" for i in range(len(value))]
                yield from ((_TAGS["lr"] + end, rate) for end, rate in zip(ends, value, strict=True))
            elif value is not None:
                tag = _TAGS.get(name) or tags.safe(name)
                tag = tag if "/" in tag else f"overview/{tag}"
                if tag in self._measured_tags:
                    self._warn(tag, f"{tag} is measured, so the logged value is left out; give it another name")
                else:
                    yield tag, value.detach() if isinstance(value, Tensor) else value

    def _numbers(self, values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The values by tag: those that are numbers already, and those that are still on a device."""
        numbers: dict[str, float] = {}
        tensors: dict[str, Tensor] = {}
        for tag, value in self._tagged(values):
            try:
                if isinstance(value, Tensor) and value.numel() == 1 and not (value.is_complex() or value.is_meta):
                    value = unsharded(value)
                    if not value.is_cpu:
                        tensors[tag] = value.reshape(())
                        continue
                numbers[tag] = float(value.item() if hasattr(value, "item") else value)
            except Exception:  # an object of the user may raise anything
                kind = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                self._warn(tag, f"{tag} is a {kind} and not a number, so it is left out; log a number or a 0-d tensor")
        return numbers, tensors

    def _optimizers(self) -> list[Optimizer]:
        """The proximal optimizers that carry the regularizer."""
        return [carrier.optimizer for carrier in carriers(self._regularizer)]

    # ------------------------------------------------------------------ weights

    def _measure(self, step: int, tensors: dict[str, Tensor]) -> dict[str, float]:
        """The numbers of the weights and of `tensors`, in one read of each device. It empties `tensors`."""
        if self._gauge is None:
            return {}
        started = time.thread_time()  # not wall time, which other processes of a busy machine prolong
        numbers, others = self._gauge.read(self._near_zero, list(tensors.values()))
        for name, message in self._gauge.broken.items():
            self._warn(name, message)
        self._agenda.measuring.spend(time.thread_time() - started - self._gauge.waiting_seconds)
        self._agenda.note_measurement(step)
        self._measured_tags = frozenset(numbers)
        self._history.add(step, numbers)
        numbers.update(zip(tensors, others, strict=True))
        tensors.clear()
        return numbers

    def _draw(self, step: int) -> None:
        if self._gauge is None:
            return
        started = time.thread_time()
        self._agenda.note_pictures(step)
        values = list(pictures.pictures(self._gauge.entries(), self._gauge.tags))
        many = len(self._gauge.tags) > MAX_LINES
        if self._writer.is_open and many and importlib.util.find_spec("matplotlib"):
            # Only the writing process gets here, so an error must not make it miss the next gathering of shards.
            try:
                values += [records.figure("weight_masks/sparsity_of_all_layers", f) for f in self._history.figures()]
            except Exception as error:
                self._warn("figure", f"the sparsity of all layers is not drawn: {error_text(error)}")
        self._writer.write_values(step, values)
        self._agenda.drawing.spend(time.thread_time() - started)

    @contextlib.contextmanager
    def _measuring(self) -> Iterator[None]:
        """Turns an error in its block, such as that of a replaced module, into a warning; all other logging goes on."""
        try:
            yield
        except Exception as error:
            self._gauge = None
            self._warn("measured", f"the weights are not measured any more, other logging goes on: {error_text(error)}")

    # ------------------------------------------------------------------ the run

    def _begin(self, step: int) -> None:
        self._gauge = Gauge(self._regularizer)
        self._agenda.start(step)
        self._sharded = any(is_sharded(w) for _, w in self._regularizer.named_parameters())
        self._agenda.bound_by_steps = self._sharded
        if not _is_rank_0():
            return
        has_earlier_run = self._writer.open(self._open, step)
        if has_earlier_run and step <= 1:
            self._warn(
                "earlier",
                f"there is an earlier run in this directory, and its points from step {step} on are replaced; log "
                "into another one to keep both",
            )
        try:
            values = [
                records.layout(layout(list(self._gauge.tags.values()))),
                records.text("about/3_glossary", texts.glossary(self._near_zero)),
                records.text("about/2_regularizer", texts.regularizer_text(self._regularizer)),
                *records.hyperparameters(printable(self._name, 1000), self._hyperparameters(), _METRICS),
            ]
            self._writer.write_values(step, values)
        except Exception as error:
            self._writer.stop(error)

    def _finish(self, step: int, failed: bool) -> None:
        """Writes the last state of the run, so that every curve reaches the last step."""
        for name, (value_step, value) in self._agenda.postponed.items():
            numbers, tensors = self._numbers({name: value})
            self._writer.write_scalars(value_step, numbers | _read(tensors))
        with self._measuring():
            if not self._agenda.was_measured(step):
                self._writer.write_scalars(step, self._measure(step, {}))
            if self._agenda.draws and not self._agenda.was_drawn(step):
                self._draw(step)
            if self._gauge is not None:
                summary = texts.sparsity_text(sparsity(self._regularizer))
                self._writer.write_values(step, [records.text("about/1_summary", summary)])
        self._writer.write_values(step, [records.end(failed)])

    def _go_back(self, step: int, last: int) -> None:
        """Continues at a smaller step, after a return to a checkpoint."""
        self._warn(
            "back",
            f"step {step} was logged after step {last}, so what was logged from {step} on is replaced. If the training "
            "did not go back to a checkpoint, log a step that grows through all epochs",
        )
        self._writer.restart(step)
        self._agenda.go_back(step)
        self._history.go_back(step)

    def _hyperparameters(self) -> dict[str, Hyperparameter]:
        """Optimizer, learning rate, strengths and the hyperparameters of the user."""
        hyperparameters: dict[str, Hyperparameter] = {}
        if optimizers := self._optimizers():
            hyperparameters["optimizer"] = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            group = optimizers[0].param_groups[0]
            # The rate that a scheduler starts from, or the peak of OneCycleLR.
            rate = group.get("max_lr", group.get("initial_lr", group.get("lr")))
            if rate is not None:
                hyperparameters["lr"] = float(rate)
        terms = self._regularizer.terms
        for key, term in terms.items():
            for name, strength in term.strengths.items():
                label = key if len(term.strengths) == 1 else f"{key}.{name}"
                if len(terms) == 1 and len(term.strengths) > 1:
                    label = name  # so the λ₁ of an elastic net is in the same column as the λ of L1
                hyperparameters[f"lambda_{printable(label)}"] = strength
        return {**hyperparameters, **self._hparams}


def _read(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    entries, _ = read(list(tensors.values()))
    return {tag: value for tag, [value] in zip(tensors, entries, strict=True)}


def _step_number(value: Any) -> int | None:
    """A whole number ≥ 0 of any type, such as `epoch * 1.0` or a counter on the CPU, as an int; otherwise None."""
    try:
        return int(value) if value == int(value) >= 0 else None
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def _is_rank_0() -> bool:
    """Whether this is the process that writes."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _checked_hyperparameters(values: Mapping[str, Any]) -> dict[str, Hyperparameter]:
    if not isinstance(values, Mapping):
        raise TypeError(f'hparams is a {type(values).__name__}; pass a dict: hparams={{"width": 300}}')
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, (bool, int, float, str)):
            raise ValueError(
                f"hparams[{name!r}]={value!r} is a {type(value).__name__}; give names to plain numbers, texts and "
                "booleans: .item() or str() makes one"
            )
    return dict(values)
