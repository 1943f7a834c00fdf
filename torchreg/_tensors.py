"""Tensors of weights and steps: what they must be, how wide, and how they lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from torchreg._checks import nonnegative
from torchreg._distributed import local_part

Step = float | Tensor
"""A prox step: a number, or a tensor that broadcasts against the weights."""

PIECE = 1 << 16
"""The number of weights of a large parameter that a CPU handles at a time: what belongs to them fits in its caches."""


def checked_weights(name: str, w: object) -> Tensor:
    """`w` if it is a floating or complex tensor, else an error."""
    if not isinstance(w, Tensor):
        raise TypeError(
            f"{name} takes a tensor of weights, got {type(w).__name__}; for a model use Regularizer(model, ...)"
        )
    if not (w.is_floating_point() or w.is_complex()):
        raise TypeError(f"{name} needs floating or complex weights, got {w.dtype}; convert them with .float()")
    return w


def checked_step(value: object, shape: torch.Size) -> Step:
    """`value` as a prox step for weights of `shape`. Reads a tensor, so it may synchronize with its device.

    Under a transformation of `torch.func` there are no entries to read, so there they are taken on trust.

    >>> checked_step(-0.1, torch.Size([3]))
    Traceback (most recent call last):
    ...
    ValueError: step=-0.1 must be finite and at least 0; pass the learning rate, or a tensor of steps
    """
    if not isinstance(value, Tensor):
        return nonnegative("step", value, "pass the learning rate, or a tensor of steps")
    if not value.is_floating_point():
        raise TypeError(f"step has dtype {value.dtype}; steps are real floating-point numbers, convert with .float()")
    try:
        fits = torch.broadcast_shapes(value.shape, shape) == shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"step of shape {tuple(value.shape)} does not broadcast to weights of shape {tuple(shape)}; "
            "pass a number, or one step per weight"
        )
    here = local_part(value)
    fine = (here >= 0) & here.isfinite()
    if not value.is_meta and not is_transformed() and not bool(fine.all()):
        raise ValueError(
            f"step has the entry {here[~fine][0].item()}; every entry must be finite and at least 0: "
            "pass the learning rate, or a tensor of steps"
        )
    return widened(value)


def widened(w: Tensor) -> Tensor:
    """`w` in float32 or wider: sums of float16 overflow, and bfloat16 rounds a total to 8 bits."""
    if w.dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        return w
    return w.to(torch.complex64 if w.is_complex() else torch.float32)


def is_transformed() -> bool:
    """This runs under `vmap`, `grad` or another transformation of `torch.func`, which stands in for the tensors."""
    return bool(torch._C._are_functorch_transforms_active())


def is_differentiated() -> bool:
    """This runs under a derivative of `torch.func`: through `vmap` alone autograd sees."""
    functorch = torch._C._functorch
    differentiating = (functorch.TransformType.Grad, functorch.TransformType.Jvp)
    return any(level.key() in differentiating for level in functorch.get_interpreter_stack() or ())


def is_dense(w: Tensor, anchor: Tensor | None) -> bool:
    """Memory that a kernel can read from one end to the other, as that of its anchor."""
    return (
        type(w) in (Tensor, Parameter)
        and w.layout is torch.strided
        # `empty_like` keeps the strides of dense memory alone.
        and (w.is_contiguous() or torch.empty_like(w).stride() == w.stride())
        and not w.is_neg()
        and (anchor is None or (is_laid_out_like(anchor, w) and not anchor.requires_grad))
    )


def is_laid_out_like(other: Tensor, w: Tensor) -> bool:
    """Entry i of `other` lies where entry i of `w` does, on its device, and is of its dtype."""
    return (
        type(other) in (Tensor, Parameter)
        and other.device == w.device
        and other.dtype is w.dtype
        and other.layout is torch.strided
        and other.shape == w.shape
        and other.stride() == w.stride()
        and not other.is_neg()
    )
