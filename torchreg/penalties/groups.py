"""Groups: which entries of a weight belong together, and a weight for each group."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchreg._checks import nonnegative
from torchreg._tensors import WHOLE, Layout, Step
from torchreg.penalties.functional import group_soft_threshold, shared_group_soft_threshold

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Groups(ABC):
    """A division of a weight's entries into groups of one size.

    A subclass names the dimensions that each group spans, in `spanned(ndim)`. Reductions over them with `keepdim` give
    one number per group, which broadcasts back against the weight, so nothing is copied or moved.

    >>> w = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    >>> w / Rows().norms(w).clamp(min=1)
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """

    layout = WHOLE  # of the weight over processes: set by on_part, and no field of the dataclass

    @abstractmethod
    def spanned(self, ndim: int) -> tuple[int, ...]:
        """The dimensions that a group spans in a weight with `ndim` ≥ 2 dimensions."""

    def dim(self, w: Tensor) -> tuple[int, ...]:
        """The dimensions of `w` that a group spans.

        Raises:
            ValueError: `w` has fewer than two dimensions.
        """
        if w.dim() < 2:
            raise ValueError(
                f"{self!r} needs a weight with two or more dimensions, got shape {tuple(w.shape)}; leave it out of the "
                "selection, or give it a penalty of single weights such as L1"
            )
        return self.spanned(w.dim())

    def shape(self, w: Tensor) -> tuple[int, ...]:
        """The shape of `w` with one entry per group: 1 in every dimension that a group spans."""
        dim = self.dim(w)
        return tuple(1 if d in dim else size for d, size in enumerate(self.layout.whole_shape(w)))

    def size(self, w: Tensor) -> int:
        """The number of entries in each group."""
        shape = self.layout.whole_shape(w)
        return math.prod([shape[d] for d in self.dim(w)])  # a list: torch.compile takes no generator here

    def norms(self, w: Tensor) -> Tensor:
        """‖w_g‖₂ of every group, real, in `shape(w)`. Its gradient at a group of zeros is 0."""
        dim = self.dim(w)
        return self.layout.across(dim).norms(w, dim)

    def total(self, x: Tensor) -> Tensor:
        """The sum of `x`, which has one number per group. Groups that several processes share count in one of them."""
        return self.layout.across(self.dim(x)).once(x.sum())

    def soft_threshold(self, w: Tensor, step: Step, radius: Step) -> Tensor:
        """`functional.group_soft_threshold` of these groups at step·radius, where `radius` is one number per group."""
        dim, threshold = self.dim(w), step * radius
        peers = self.layout.across(dim)
        if peers.alone:
            return group_soft_threshold(w, threshold, dim)
        # All peers must agree, and one that has a single row cannot see whether the step varies within a group.
        varies = isinstance(step, Tensor) and step.dim() > 0
        return shared_group_soft_threshold(w, threshold, dim, varies, peers)

    def on_part(self, layout: Layout) -> Self:
        """The same groups for this process's part of a weight: they may reach into the parts of other processes.

        Processes exchange what is summed over such a group: one number per group, and never a weight.
        """
        part = copy.copy(self)
        object.__setattr__(part, "layout", layout)
        return part


@dataclass(frozen=True)
class Rows(Groups):
    """One group for each index of dimension 0: all the weights that feed one output, a neuron or a filter.

    Shape:
        w: (outputs, inputs, ...), two or more dimensions: the weight of `nn.Linear` and of convolutions. In a
        transposed convolution dimension 0 is the input.

    >>> Rows().norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[5.],
            [0.]])
    """

    def spanned(self, ndim: int) -> tuple[int, ...]:
        return tuple(range(1, ndim))


@dataclass(frozen=True)
class Columns(Groups):
    """One group for each index of dimension 1: all the weights that one input feeds, over outputs and kernel.

    Shape:
        w: (outputs, inputs, ...), two or more dimensions.

    >>> Columns().norms(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
    tensor([[5., 0.]])
    """

    def spanned(self, ndim: int) -> tuple[int, ...]:
        return (0, *range(2, ndim))


class GroupWeights(tuple[float, ...]):
    """One factor ≥ 0 per group, compared by value. It caches its tensors, so that a training step transfers nothing."""

    _tensors: dict[tuple[torch.device, torch.dtype], Tensor]

    def __new__(cls, values: Sequence[float] | Tensor) -> GroupWeights:
        if isinstance(values, Tensor):
            values = values.tolist()
        if isinstance(values, str) or not hasattr(values, "__iter__"):
            raise TypeError(
                f"group_weights={values!r} is a {type(values).__name__}; give one number per group, as a list or a 1-d "
                "tensor, or None for the square root of the group's size"
            )
        move = "give one factor per group, such as 1.0"
        new = super().__new__(cls, (nonnegative(f"group_weights[{i}]", v, move) for i, v in enumerate(values)))
        new._tensors = {}
        return new

    def __repr__(self) -> str:
        return super().__repr__() if len(self) <= 6 else f"<{len(self)} numbers>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (tuple(self),)

    def on(self, w: Tensor, groups: Groups) -> Tensor:
        """The factors of the groups in `w` as a tensor that broadcasts against it, on its device, in its precision.

        Raises:
            ValueError: `w` has another number of groups.
        """
        shape = groups.shape(w)
        if len(self) != math.prod(shape):
            raise ValueError(
                f"group_weights has {len(self)} entries, and a weight of shape {tuple(w.shape)} has "
                f"{math.prod(shape)} groups in {groups!r}; give one factor per group, or None"
            )
        key = (w.device, w.real.dtype)
        if key not in self._tensors:
            with torch.inference_mode(False):  # a tensor made in inference mode could never meet autograd
                self._tensors[key] = torch.tensor(list(self), dtype=key[1], device=key[0])
        return groups.layout.part(self._tensors[key].view(shape))
