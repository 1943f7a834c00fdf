"""Steps in Triton's kernels: the stock step and the prox in one pass over a GPU's memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from torchreg._tensors import is_dense, is_laid_out_like
from torchreg.kernels import backend
from torchreg.optim.executors.job import Executor, Job
from torchreg.optim.executors.native import ROUND_TO_NEAREST
from torchreg.optim.executors.rounding import NARROW
from torchreg.optim.executors.specs import Spec, supports
from torchreg.optim.executors.tables import UNPENALIZED, Inputs, StepTables
from torchreg.optim.step_sizes import UNIT_MOMENTUM, Group, State, as_number
from torchreg.penalties.coefficients import L1L2


class DeviceTables(NamedTuple):
    """A step's tables, on the host and on the device.

    Attributes:
        counts: the counts of steps that the host keeps, with their rows.
        table: a `torchreg.kernels.cuda.Table`.
    """

    host: StepTables
    counts: list[tuple[int, Tensor]]
    table: Any


class TritonExecutor(Executor):
    """One optimizer's steps in Triton's kernels, without a look at the device.

    It takes dense weights, gradients and buffers of one memory layout, all on one GPU, in float32 or float64, with
    penalties that are sums of |w| and w²; in bfloat16 or float16 too where they are rounded to nearest. It leaves all
    else to the next executor, and the very first step too. A weight differs from the plain step's by at most 4
    roundings of the terms that it is the sum of; narrower ones are computed in float32 and rounded once.

    Counts of steps (capturable or fused), a tensor lr, and a GradScaler's scale and verdict are read on the device, and
    so is the momentum of SGD's prox, which stands in the optimizer's state as a tensor from then on. A step may be
    captured in a CUDA graph after two that were not; strengths and numbers of a group are then those of the capture.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._tables: DeviceTables | None = None
        self._captured: list[DeviceTables] = []  # what CUDA graphs read at each replay

    def step(self, job: Job) -> bool:
        kernels = backend.triton()
        if kernels is None:
            return False
        inputs = Inputs(job)
        if not inputs.parameters or not kernels.serves(inputs.parameters[0].device):
            return False
        device = inputs.parameters[0].device
        inputs.settings.append([id(_device_lr(group, device)) for group in job.optimizer.param_groups])
        capturing = kernels.capturing(device)
        if self._tables is None or not self._tables.host.still_valid(inputs):
            if capturing:
                return False  # what is sent to the device now would be there at the replay alone
            self._tables = self._build(kernels, job, inputs, device)
        if self._tables is None:
            return False
        host, counts, table = self._tables
        found_inf, grad_scale = (
            _on_device(getattr(job.optimizer, name, None), device) for name in ("found_inf", "grad_scale")
        )
        if capturing and not table.may_be_captured:
            return False
        if counts and (capturing or found_inf is not None):
            return False  # the host cannot know whether the device takes the step
        if not host.set_gradients(inputs.gradients):
            return False
        try:
            table.try_out(host.tables.addresses, found_inf, grad_scale)
        except Exception as error:  # of a compiler, before anything has changed
            backend.give_up_triton(error)
            return False
        if not host.advance_momenta():
            return False
        _advance_counts(host, counts)
        host.set_lrs([_host_lr(group, device) for group in inputs.groups])
        table.run(host.tables.addresses, host.tables.numbers, found_inf, grad_scale)
        if capturing:
            self._captured.append(self._tables)
        increment_version(inputs.parameters)
        if grad_scale is not None:
            increment_version(inputs.gradients)
        return True

    def _build(self, kernels: Any, job: Job, inputs: Inputs, device: torch.device) -> DeviceTables | None:
        """The tables; None where something is not for the kernels."""
        coefficients = inputs.coefficients()
        if coefficients is None or not all(
            self._supports(kernels, job, inputs, i, own, device) for i, own in enumerate(coefficients)
        ):
            return None
        host, numbers = StepTables(inputs, coefficients), []
        counts: list[tuple[int, Tensor]] = []
        for i, (group, w, own) in enumerate(zip(inputs.groups, inputs.parameters, coefficients, strict=True)):
            state, names = job.optimizer.state.get(w, {}), self.spec.buffers(group)
            advanced = self._count(state)  # a number that the device advances: the count, or the momentum
            response = None if inputs.penalties[i] is UNPENALIZED else self.spec.unit_response(group)
            if advanced is None and response is not None:
                advanced, response = _momentum(state, device), None
                host.slots.append((state, UNIT_MOMENTUM, advanced))
            elif advanced is not None and not _is_read_on_device(advanced, group, device):
                counts.append((i, advanced))
                advanced = None
            elif advanced is not None:
                state.pop(UNIT_MOMENTUM, None)  # as in `AdamKin`: nobody tracks it from here on
                response = None
            if response is not None:
                host.momenta.append((i, state, response))
            host.slots += [(state, name, state[name]) for name in names if name]
            buffers = [state[name] if name else None for name in names]
            tensors = [w, *buffers, own.anchor, advanced, _device_lr(group, device)]
            host.keep_track_of(tensors)
            host.layouts.append((w.dtype, w.stride(), w.numel()))
            first, *others = (0 if x is None else x.data_ptr() for x in tensors)
            host.tables.add((first, 0, *others, 0, w.numel()))
            host.lrs.append(_host_lr(group, device))
            numbers.append(self.spec.numbers(group, own, ROUND_TO_NEAREST)._replace(lr=host.lrs[-1]))
        host.tables.number(numbers)
        kernel, dtypes = getattr(kernels, self.spec.kernel), [w.dtype for w in inputs.parameters]
        return DeviceTables(host, counts, kernels.Table(kernel, host.tables.addresses, dtypes, device))

    def _count(self, state: State) -> Tensor | None:
        """Adam's count of steps; one in SGD's state is that of random bits."""
        return state.get("step") if self.spec.counts else None

    def _supports(self, kernels: Any, job: Job, inputs: Inputs, i: int, strengths: L1L2, device: torch.device) -> bool:
        """The kernels know the settings and the memory of this parameter, and its state is there."""
        group, w = inputs.groups[i], inputs.parameters[i]
        state = job.optimizer.state.get(w, {})
        buffers = [state.get(name) for name in self.spec.buffers(group) if name]
        lr_is_readable = isinstance(group["lr"], Tensor) and _is_number(group["lr"], device)
        if not supports(group, lr_is_readable) or any(buffer is None for buffer in buffers):
            return False
        count = self._count(state)
        tracks = count is None and inputs.penalties[i] is not UNPENALIZED and self.spec.unit_response(group) is not None
        return (
            w.device == device
            and w.dtype in kernels.DTYPES
            and (w.dtype not in NARROW or job.rounding.key(state) == ROUND_TO_NEAREST)
            and is_dense(w, strengths.anchor)
            and all(is_laid_out_like(buffer, w) for buffer in buffers)
            and (count is None or _is_number(count, device))
            and not (tracks and state.get(UNIT_MOMENTUM) is None)
        )


def _advance_counts(host: StepTables, counts: list[tuple[int, Tensor]]) -> None:
    """Adds 1 to the counts of steps that the host keeps, and writes them into the tables."""
    if not counts:
        return
    on_host = [count for _, count in counts]
    torch._foreach_add_(on_host, 1)
    for (row, _), count in zip(counts, torch.stack(on_host).tolist(), strict=True):
        host.tables.addresses[(row + 1) * host.tables.address_width - 2] = int(count)


def _is_number(value: Tensor, device: torch.device) -> bool:
    """A number that the host can read without waiting, or that the kernels can."""
    on_device = value.device == device and value.dtype is torch.float32
    return type(value) is Tensor and value.numel() == 1 and (value.is_cpu or on_device)


def _is_read_on_device(value: Any, group: Group, device: torch.device) -> bool:
    """The kernels read this number where it lies; where they are interpreted, that is where a GPU's kernels would."""
    if not isinstance(value, Tensor) or value.device != device or value.dtype is not torch.float32:
        return False
    return device.type != "cpu" or bool(group.get("capturable") or group["fused"])


def _device_lr(group: Group, device: torch.device) -> Tensor | None:
    """A learning rate that the kernels read, so that a captured step sees each of its values."""
    return group["lr"] if _is_read_on_device(group["lr"], group, device) else None


def _host_lr(group: Group, device: torch.device) -> float:
    return 0.0 if _is_read_on_device(group["lr"], group, device) else float(as_number(group["lr"]))


def _momentum(state: State, device: torch.device) -> Tensor:
    """The momentum of SGD's prox, on the device: the host does not know which steps a GradScaler or a graph takes."""
    known: Any = state[UNIT_MOMENTUM]
    if not isinstance(known, Tensor):
        state[UNIT_MOMENTUM] = torch.full((), known, dtype=torch.float64, device=device)
    elif known.dtype is not torch.float64 or known.device != device:  # after loading a checkpoint
        state[UNIT_MOMENTUM] = known.to(device, torch.float64)
    return state[UNIT_MOMENTUM]


def _on_device(number: Any, device: torch.device) -> Tensor | None:
    """A number that a GradScaler has set, where the kernels read it."""
    return None if number is None else number.to(device, torch.float32, non_blocking=True)
