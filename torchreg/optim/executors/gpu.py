"""The stock step and the prox in one pass over the memory of a GPU, where Triton serves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import SGD, Optimizer

from torchreg._tensors import is_dense, is_laid_out_like
from torchreg.kernels import backend
from torchreg.optim.executors.native import FREE, NO_KEY, Group, OnePass, Rows, State, _settings, _soft, with_gradients
from torchreg.optim.executors.rounding import NARROW, Rounding
from torchreg.optim.step_sizes import Followed, _number
from torchreg.penalties import Penalty
from torchreg.penalties.coefficients import L1L2

SETTINGS = ("weight_decay", "momentum", "dampening", "eps")


class Ready(NamedTuple):
    """A step's tables, on the host and on the device.

    Attributes:
        counts: the counts of steps that the host keeps, with their rows.
        table: `torchreg.kernels.cuda.Table`.
    """

    rows: Rows
    counts: list[tuple[int, Tensor]]
    table: Any


class OnDevice:
    """One optimizer's steps in Triton's kernels, as far as they can take them: without a look at the device.

    They take dense weights, gradients and buffers of one memory layout, all on one GPU, in float32 or float64, with
    penalties that are sums of |w| and w²; in bfloat16 or float16 too where they are rounded to nearest. All else, the
    very first step too, is left to the stock step and the prox after it. Weights differ from theirs by at most 4
    roundings of the terms that a weight is the sum of; narrower ones are computed in float32 and rounded once.

    Counts of steps (capturable or fused), a tensor lr, and a GradScaler's scale and verdict are read on the device, and
    so is the momentum of SGD's prox, which stands in the optimizer's state as a tensor from then on. A step may be
    captured in a CUDA graph after two that were not; strengths and numbers of a group are then those of the capture.
    """

    def __init__(self, one: OnePass) -> None:
        self._one = one
        self._ready: Ready | None = None
        self._captured: list[Ready] = []  # what CUDA graphs read at each replay

    def step(self, optimizer: Optimizer, penalties: Mapping[int, Penalty | None], rounding: Rounding) -> bool:
        """Takes a step and its prox and returns True; or returns False, and nothing has changed."""
        kernels = backend.triton()
        if kernels is None:
            return False
        groups, parameters, gradients = with_gradients(optimizer)
        if not parameters or not kernels.serves(parameters[0].device):
            return False
        device = parameters[0].device
        capturing = kernels.capturing(device)
        states = list(optimizer.state.values())
        asked = [penalties.get(id(parameter), FREE) for parameter in parameters]
        settings: list[Any] = [[*_settings(group), id(_device_lr(group, device))] for group in optimizer.param_groups]
        settings.append(rounding)
        known = self._ready
        if known is None or not (known.rows.stand(parameters, states, settings) and known.rows.strengthen(asked)):
            if capturing:
                return False  # what is sent to the device now would be there at the replay alone
            known = self._ready = self._made(kernels, optimizer, groups, parameters, states, settings, asked, rounding)
        if known is None:
            return False
        rows, counts, table = known
        found_inf, grad_scale = (_here(getattr(optimizer, name, None), device) for name in ("found_inf", "grad_scale"))
        if capturing and not table.may_be_captured:
            return False
        if counts and (capturing or found_inf is not None):
            return False  # the host cannot know whether the device takes the step
        if not rows.point_to(gradients):
            return False
        try:
            table.try_out(rows.tables.addresses, found_inf, grad_scale)
        except Exception as error:  # of a compiler, before anything has changed
            backend.give_up_triton(error)
            return False
        if not rows.follow():
            return False
        self._write_numbers(known, groups)
        table.run(rows.tables.addresses, rows.tables.numbers, found_inf, grad_scale)
        if capturing:
            self._captured.append(known)
        increment_version(parameters)
        if grad_scale is not None:
            increment_version(gradients)
        return True

    def _write_numbers(self, known: Ready, groups: list[Group]) -> None:
        """Counts of steps and lr, where the host knows them."""
        rows, counts, _ = known
        addresses, width = rows.tables.addresses, rows.tables.address_width
        if counts:
            on_host = [count for _, count in counts]
            torch._foreach_add_(on_host, 1)
            for (row, _), count in zip(counts, torch.stack(on_host).tolist(), strict=True):
                addresses[(row + 1) * width - 2] = int(count)
        device = rows.memory[0].device
        lrs = [_host_lr(group, device) for group in groups]
        if lrs != rows.lrs:
            rows.lrs = lrs
            for row, lr in enumerate(lrs):
                rows.tables.numbers[row * rows.tables.number_width + 1] = lr

    def _made(
        self,
        kernels: Any,
        optimizer: Optimizer,
        groups: list[Group],
        parameters: list[Tensor],
        states: list[Any],
        settings: list[Any],
        asked: list[Any],
        rounding: Rounding,
    ) -> Ready | None:
        """The tables; None where something is not for the kernels, or for no prox at all."""
        softs = [_soft(x) for x in asked]
        if all(soft is not None and soft.l1 == soft.l2 == 0 for soft in softs):
            return None  # the stock step, bit for bit
        one, device = self._one, parameters[0].device
        every = list(zip(groups, parameters, softs, asked, strict=True))
        if not all(self._takes(kernels, optimizer, *each, device, rounding) for each in every):
            return None
        rows = Rows(parameters, states, settings, asked)
        numbers: list[Any] = []
        counts: list[tuple[int, Tensor]] = []
        for i, (group, parameter, soft, x) in enumerate(every):
            assert soft is not None
            state = optimizer.state.get(parameter, {})
            names = [name for name in one.buffers(group) if name]
            moved_on = self._count(state)
            unit = None if x is FREE else one.unit(group)
            if moved_on is None and unit is not None:
                moved_on, unit = _momentum(state, device), None
                rows.slots.append((state, Followed.KEY, moved_on))
            elif moved_on is not None and not _read_there(moved_on, group, device):
                counts.append((i, moved_on))
                moved_on = None
            elif moved_on is not None:
                state.pop(Followed.KEY, None)  # as in `AdamKin`: nobody follows it from here on
                unit = None
            if unit is not None:
                rows.units.append((i, state, unit))
            rows.slots += [(state, name, state[name]) for name in names]
            buffers = [state[name] if name else None for name in one.buffers(group)]
            tensors = [parameter, *buffers, soft.anchor, moved_on, _device_lr(group, device)]
            rows.memory += [w for w in tensors if w is not None]
            rows.pointers += [w.data_ptr() for w in tensors if w is not None]
            rows.layouts.append((parameter.dtype, parameter.stride(), parameter.numel()))
            first, *others = (0 if w is None else w.data_ptr() for w in tensors)
            rows.tables.add((first, 0, *others, 0, parameter.numel()))
            rows.lrs.append(_host_lr(group, device))
            numbers.append(one.numbers(group, soft, NO_KEY)._replace(lr=rows.lrs[-1]))
            rows.softs.append(soft)
        rows.tables.number(numbers)
        dtypes = [parameter.dtype for parameter in parameters]
        return Ready(rows, counts, kernels.Table(one.kernel(kernels), rows.tables.addresses, dtypes, device))

    def _count(self, state: State) -> Tensor | None:
        """Adam's count of steps; one that SGD left is that of random bits."""
        return None if self._one.stock is SGD else self._one.counter(state)

    def _takes(
        self,
        kernels: Any,
        optimizer: Optimizer,
        group: Group,
        parameter: Tensor,
        soft: L1L2 | None,
        asked: Any,
        device: torch.device,
        rounding: Rounding,
    ) -> bool:
        """The kernels know the settings, the penalty and the memory of this parameter, and its state is there."""
        state = optimizer.state.get(parameter, {})
        buffers = [state.get(name) for name in self._one.buffers(group) if name]
        if soft is None or not _knows(group, device) or any(buffer is None for buffer in buffers):
            return False
        count = self._count(state)
        follows = count is None and asked is not FREE and self._one.unit(group) is not None
        return (
            parameter.device == device
            and parameter.dtype in kernels.DTYPES
            and (parameter.dtype not in NARROW or rounding.key(state) == NO_KEY)
            and is_dense(parameter, soft.anchor)
            and all(is_laid_out_like(buffer, parameter) for buffer in buffers)
            and (count is None or _is_number(count, device))
            and not (follows and state.get(Followed.KEY) is None)
        )


def _knows(group: Group, device: torch.device) -> bool:
    """The choice of an implementation is left open, or a fused one is asked for; and all settings are numbers."""
    lr, betas = group["lr"], group.get("betas", ())
    return (
        group["foreach"] is None
        and group["fused"] is not False
        and not group["differentiable"]
        and not (isinstance(lr, Tensor) and (lr.requires_grad or not _is_number(lr, device)))
        and not any(isinstance(value, Tensor) for value in (*betas, *(group.get(key) for key in SETTINGS)))
    )


def _is_number(value: Tensor, device: torch.device) -> bool:
    """A number that the host can read without waiting, or that the kernels can."""
    here = value.device == device and value.dtype is torch.float32
    return type(value) is Tensor and value.numel() == 1 and (value.is_cpu or here)


def _read_there(value: Any, group: Group, device: torch.device) -> bool:
    """The kernels read this number where it lies; where they are interpreted, that is where a GPU's kernels would."""
    if not isinstance(value, Tensor) or value.device != device or value.dtype is not torch.float32:
        return False
    return device.type != "cpu" or bool(group.get("capturable") or group["fused"])


def _device_lr(group: Group, device: torch.device) -> Tensor | None:
    """A learning rate that the kernels read, so that a captured step sees each of its values."""
    return group["lr"] if _read_there(group["lr"], group, device) else None


def _host_lr(group: Group, device: torch.device) -> float:
    return 0.0 if _read_there(group["lr"], group, device) else float(_number(group["lr"]))


def _momentum(state: State, device: torch.device) -> Tensor:
    """The momentum of SGD's prox, on the device: the host does not know which steps a GradScaler or a graph takes."""
    found: Any = state[Followed.KEY]
    if not isinstance(found, Tensor):
        state[Followed.KEY] = torch.full((), found, dtype=torch.float64, device=device)
    elif found.dtype is not torch.float64 or found.device != device:  # after loading a checkpoint
        state[Followed.KEY] = found.to(device, torch.float64)
    return state[Followed.KEY]


def _here(number: Any, device: torch.device) -> Tensor | None:
    """What a GradScaler has put down, where the kernels read it."""
    return None if number is None else number.to(device, torch.float32, non_blocking=True)
