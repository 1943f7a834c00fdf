"""Tensors of weights and steps: checks of what they may be, their precision, and how they lie in memory and over
processes."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import Parameter

from torchreg._checks import nonnegative

Step = float | Tensor
"""A prox step: a number, or a tensor that broadcasts against the weights."""

PIECE = 1 << 16
"""The number of weights of a large parameter that a CPU handles at a time: what belongs to them fits in its caches."""


# ---------------------------------------------------------------------- checks and precision


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
    """`value` as a prox step for weights of `shape`. It reads a tensor, so it may synchronize with its device.

    Under a transformation of `torch.func` a tensor has no entries to read, so they are not checked there.

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
    entries = local_part(value)
    valid = (entries >= 0) & entries.isfinite()
    if not value.is_meta and not is_transformed() and not bool(valid.all()):
        raise ValueError(
            f"step has the entry {entries[~valid][0].item()}; every entry must be finite and at least 0: "
            "pass the learning rate, or a tensor of steps"
        )
    return widened(value)


def widened(w: Tensor) -> Tensor:
    """`w` in float32 or wider: sums of float16 overflow, and bfloat16 rounds a total to 8 bits."""
    if w.dtype in (torch.float32, torch.float64, torch.complex64, torch.complex128):
        return w
    return w.to(torch.complex64 if w.is_complex() else torch.float32)


# ---------------------------------------------------------------------- over processes


class ReduceGroup:
    """The processes that share a sum. This class is the simple case: one process has all of it."""

    alone = True

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every process's `x`, on each of them: a new tensor, or `x` itself in a process alone.

        All processes go on with the same sum, so each has the whole slope of its own part: the gradient is not reduced.

        >>> ALONE.sum(torch.tensor([1.0, 2.0]))
        tensor([1., 2.])
        """
        return x

    def sums(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """`sum` of two tensors of one shape, in one exchange."""
        return a, b

    def max(self, x: Tensor) -> Tensor:
        """The maximum over the processes, on each of them, without a graph. It may drop a NaN."""
        return x

    def norms(self, w: Tensor, dim: tuple[int, ...]) -> Tensor:
        """‖w‖₂ along dimensions of which each process has a part. Its gradient at zero is 0."""
        return torch.linalg.vector_norm(w, dim=dim, keepdim=True)

    def once(self, x: Tensor) -> Tensor:
        """`x`, which all the processes have, as the part of one of them: it counts once in `sum`."""
        return x


ALONE = ReduceGroup()


class Layout:
    """How a weight lies over processes. This class is the simple case: one process has all of it.

    `torchreg._distributed.ShardLayout` is the other case. A formula written with these methods holds in both.
    """

    divided = False

    @property
    def peers(self) -> ReduceGroup:
        """The processes that have the parts of the weight."""
        return ALONE

    def across(self, dims: Collection[int]) -> ReduceGroup:
        """The processes that have different parts along these dimensions."""
        return ALONE

    def whole_shape(self, part: Tensor) -> torch.Size:
        """The shape of the whole weight of which `part` is in this process."""
        return part.shape

    def part(self, x: Tensor) -> Tensor:
        """This process's part of a tensor that broadcasts against the whole weight, or is divided as it is."""
        return x

    def step_of_part(self, step: Step, part: Tensor) -> Step:
        """This process's part of a prox step, which may already have the shape of its `part` of the weight."""
        return step

    def whole(self, part: Tensor) -> Tensor:
        """The tensor whose part in this process is `part`: the inverse of `part()`."""
        return part


WHOLE = Layout()


def is_sharded(w: Tensor) -> bool:
    """Whether each process has a shard of `w` (a DTensor)."""
    return hasattr(w, "full_tensor")


def local_part(x: Tensor) -> Tensor:
    """This process's shard of `x`, and all of an `x` that is not sharded. Autograd follows."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined, no-any-return]


# ---------------------------------------------------------------------- torch.func and memory


def is_transformed() -> bool:
    """Whether this runs under `vmap`, `grad` or another transformation of `torch.func`, which replaces the tensors."""
    return bool(torch._C._are_functorch_transforms_active())


def is_differentiated() -> bool:
    """Whether this runs under a derivative of `torch.func`. Autograd sees through `vmap` alone, not through these."""
    functorch = torch._C._functorch
    differentiating = (functorch.TransformType.Grad, functorch.TransformType.Jvp)
    return any(level.key() in differentiating for level in functorch.get_interpreter_stack() or ())


def is_dense(w: Tensor, anchor: Tensor | None) -> bool:
    """Whether a kernel can read the memory of `w` from one end to the other, and that of its anchor alongside."""
    return (
        type(w) in (Tensor, Parameter)
        and w.layout is torch.strided
        # `empty_like` keeps the strides of dense memory alone.
        and (w.is_contiguous() or torch.empty_like(w).stride() == w.stride())
        and not w.is_neg()
        and (anchor is None or (is_laid_out_like(anchor, w) and not anchor.requires_grad))
    )


def is_laid_out_like(other: Tensor, w: Tensor) -> bool:
    """Whether entry i of `other` lies where entry i of `w` does, on the same device and with the same dtype."""
    return (
        type(other) in (Tensor, Parameter)
        and other.device == w.device
        and other.dtype is w.dtype
        and other.layout is torch.strided
        and other.shape == w.shape
        and other.stride() == w.stride()
        and not other.is_neg()
    )
