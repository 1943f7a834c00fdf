"""λ₁Σ|w − w₀| + λ₂Σ(w − w₀)² of many weights: values, gradients, or both, in one pass over them."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version

from torchreg._tensors import is_dense, is_transformed
from torchreg.kernels.backend import native, triton
from torchreg.kernels.native import DTYPES
from torchreg.penalties.coefficients import L1L2

VALUE, GRADIENT, BOTH = 0, 1, 2
"""The tasks, as `native.c` numbers them."""

PACK = struct.Struct("=5q2d").pack
"""A `soft_tensor` of `native.c`."""


def available() -> bool:
    """A kernel can serve now: nothing watches or transforms torch's operations, from which it would hide."""
    return (
        not torch.compiler.is_compiling()  # first: a graph would break at what else is asked here
        and (native() is not None or triton() is not None)
        and not is_transformed()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def takes(w: Tensor, anchor: Tensor | None) -> bool:
    """There is a kernel here that takes this weight."""
    if w.is_cpu and native() is not None:
        return serves(w, anchor)
    kernels = triton()
    return (
        kernels is not None
        and kernels.serves(w.device)
        and not kernels.capturing(w.device)  # a graph's replay would find nothing of what is sent now
        and w.dtype in (torch.float32, torch.float64)
        and is_dense(w, anchor)
    )


def serves(w: Tensor, anchor: Tensor | None, dtypes: Collection[torch.dtype] = (torch.float32, torch.float64)) -> bool:
    """C can read this weight: dense memory on the CPU in one of `dtypes`, and no subclass that may hold no data."""
    return w.is_cpu and w.dtype in dtypes and is_dense(w, anchor)


def value(weights: Sequence[Tensor], penalties: Sequence[L1L2]) -> Tensor:
    """The penalty of all weights: a 0-d tensor that autograd can follow, to second derivatives too.

    Args:
        weights: such as are taken (`takes`), all of one dtype and device, while a kernel is `available`.
        penalties: one for each weight.
    Returns:
        A tensor of the weights' dtype, on their device. It is summed in float64 (on a GPU from blocks in the weights'
        dtype), in the same order for any number of threads and, on a CPU, on every processor.
    """
    return _Value.apply(penalties, *weights)


def add_gradients_(weights: Sequence[Tensor], penalties: Sequence[L1L2]) -> Tensor:
    """Adds the gradient to `.grad` of every weight, which `is_laid_out_like` it or is None, and returns the value."""
    gradients = []
    for w in weights:
        if w.grad is None:
            w.grad = torch.zeros_like(w)
        gradients.append(w.grad)
    found = _run(BOTH, weights, penalties, gradients, None)
    increment_version(gradients)
    return found


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, penalties: Sequence[L1L2], *weights: Tensor) -> Tensor:
        ctx.penalties = penalties
        ctx.save_for_backward(*weights)
        return _run(VALUE, weights, penalties, [None] * len(weights), None)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        weights, penalties = ctx.saved_tensors, ctx.penalties
        if torch.is_grad_enabled() or not (available() and torch._C._has_storage(slope)):  # a batched slope has none
            return None, *(_gradient(slope, w, penalty) for w, penalty in zip(weights, penalties, strict=True))
        gradients = [torch.empty_like(w) for w in weights]
        _run(GRADIENT, weights, penalties, gradients, slope)
        return None, *gradients


def _gradient(slope: Tensor, w: Tensor, penalty: L1L2) -> Tensor:
    """The same in torch, differentiable in `slope` and `w`."""
    away = w if penalty.anchor is None else w - penalty.anchor
    gradient = slope * penalty.l1 * away.sign()
    return gradient + slope * penalty.l2 * (2 * away) if penalty.l2 else gradient


def _run(
    task: int,
    weights: Sequence[Tensor],
    penalties: Sequence[L1L2],
    gradients: Sequence[Tensor | None],
    slope: Tensor | None,
) -> Tensor:
    """Carries out a task; returns the value, which is 0 for `GRADIENT`."""
    library, kernels = native(), triton()
    if library is None or not weights[0].is_cpu:
        assert kernels is not None
        strengths, anchors = [(x.l1, x.l2) for x in penalties], [x.anchor for x in penalties]
        return kernels.soft(task, weights, strengths, anchors, gradients, slope)
    table = b"".join(
        PACK(
            w.data_ptr(),
            0 if gradient is None else gradient.data_ptr(),
            0 if penalty.anchor is None else penalty.anchor.data_ptr(),
            w.numel(),
            DTYPES[w.dtype],
            penalty.l1,
            penalty.l2,
        )
        for w, gradient, penalty in zip(weights, gradients, penalties, strict=True)
    )
    found = array("d", [0.0])
    at = None if slope is None else slope.to(torch.float64)
    address = 0 if at is None else at.data_ptr()
    if library.soft(table, len(penalties), task, found.buffer_info()[0], address, library.team, library.threads):
        raise MemoryError("no memory for the sums of the penalties; free some, or set TORCHREG_BACKEND=torch")
    return torch.tensor(found[0], dtype=weights[0].dtype, device="cpu")  # a default device may be another
