"""Steps in the native library: the stock step and the prox in one pass over a CPU's memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter
from torch.optim import Optimizer

from torchreg._distributed import is_laid_out_as, is_sharded, local_part
from torchreg._tensors import is_laid_out_like
from torchreg.kernels.backend import native
from torchreg.kernels.l1l2 import serves
from torchreg.kernels.native import DTYPES
from torchreg.optim.executors.job import Executor, Job
from torchreg.optim.executors.rounding import NARROW
from torchreg.optim.executors.specs import Spec, supports
from torchreg.optim.executors.tables import UNPENALIZED, Inputs, StepTables
from torchreg.optim.step_sizes import Group, as_number

STEPPED = (torch.float32, torch.float64, torch.bfloat16)
"""The dtypes of weights that the native step takes."""

ROUND_TO_NEAREST = -1
"""The key of a parameter that is rounded to nearest."""


class NativeExecutor(Executor):
    """One optimizer's steps in the native library.

    It takes dense weights, gradients and buffers of one dtype, float32, float64 or bfloat16, and of one memory layout,
    on the CPU, with penalties that are sums of |w| and w². It leaves all else to the next executor, and the very first
    step too, which builds the state. A weight differs from the plain step's by at most 4 roundings of the terms that it
    is the sum of (itself, its move, its threshold), and by no bit between processors or numbers of threads. bfloat16 is
    stepped in float32, of which that holds, and rounded once, with the same random bits.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self._tables: StepTables | None = None

    def step(self, job: Job) -> bool:
        library = native()
        if library is None or _is_scaled(job.optimizer):
            return False
        inputs = Inputs(job)
        if self._tables is None or not self._tables.still_valid(inputs):
            self._tables = self._build(job, inputs)
        tables = self._tables
        if tables is None:
            return False
        gradients: Sequence[Tensor | None] = inputs.gradients
        if tables.local is not None:
            gradients = [_part(gradient, w) for gradient, w in zip(inputs.gradients, inputs.parameters, strict=True)]
        if not (tables.set_gradients(gradients) and tables.advance_momenta()):
            return False
        tables.set_lrs([as_number(group["lr"]) for group in inputs.groups])
        tables.tables.run(getattr(library, self.spec.kernel), library)
        parts = [] if tables.local is None else map(_local, inputs.parameters)
        increment_version([*inputs.parameters, *parts])
        return True

    def _build(self, job: Job, inputs: Inputs) -> StepTables | None:
        """The tables; None where something is not for the native library."""
        coefficients = inputs.coefficients()
        if coefficients is None:
            return None
        result, numbers = StepTables(inputs, coefficients), []
        if any(is_sharded(w) for w in inputs.parameters):
            result.local = _local
        for i, (group, w, own) in enumerate(zip(inputs.groups, inputs.parameters, coefficients, strict=True)):
            state = job.optimizer.state.get(w, {})
            names = self.spec.buffers(group)
            if not _supports(group) or any(name and state.get(name) is None for name in names):
                return None
            count = state.get("step")  # Adam's, or that of the random bits
            # Each process steps its own part of a sharded weight.
            part, anchor = _part(w, w), None if own.anchor is None else _part(own.anchor, w)
            buffers = [_part(state[name], w) if name else None for name in names]
            key = job.rounding.key(state) if w.dtype in NARROW else ROUND_TO_NEAREST
            if (
                part is None
                or key is None
                or not (count is None or _is_count(count))
                or (own.anchor is not None and anchor is None)
                or not serves(part, anchor, STEPPED)
                or any(
                    name and (x is None or not is_laid_out_like(x, part))
                    for name, x in zip(names, buffers, strict=True)
                )
            ):
                return None
            result.slots += [
                (state, name, state[name]) for name in (*names, *(["step"] if count is not None else [])) if name
            ]
            result.keep_track_of([w, *(state[name] for name in names if name), own.anchor, count])
            result.layouts.append((part.dtype, part.stride(), part.numel()))
            response = self.spec.unit_response(group)
            if response is not None and inputs.penalties[i] is not UNPENALIZED:
                result.momenta.append((i, state, response))
            counted = (0, 0) if count is None else (count.data_ptr(), DTYPES[count.dtype])
            addresses = [0 if x is None else x.data_ptr() for x in (*buffers, anchor)]
            result.tables.add((part.data_ptr(), 0, *addresses, *counted, part.numel(), DTYPES[part.dtype]))
            numbers.append(self.spec.numbers(group, own, key))
            result.lrs.append(as_number(group["lr"]))
        result.tables.number(numbers)
        return result


def _supports(group: Group) -> bool:
    lr = group["lr"]
    return supports(group, lr_is_readable=isinstance(lr, Tensor) and lr.is_cpu) and not group.get("capturable")


def _part(x: Tensor, like: Tensor) -> Tensor | None:
    """The part of `x` that lies in this process; None where it is divided in another way than `like`."""
    if type(x) in (Tensor, Parameter):
        return x if type(like) in (Tensor, Parameter) else None
    return _local(x) if is_sharded(x) and is_laid_out_as(x, like) else None


@torch.no_grad()
def _local(x: Tensor) -> Tensor:
    return local_part(x)


def _is_scaled(optimizer: Optimizer) -> bool:
    """A GradScaler asks a fused optimizer to unscale the gradients, and to look whether they are finite."""
    return getattr(optimizer, "grad_scale", None) is not None or getattr(optimizer, "found_inf", None) is not None


def _is_count(count: Tensor) -> bool:
    return count.is_cpu and count.dtype in (torch.float32, torch.float64) and type(count) is Tensor
