"""Geometry: which entries of a weight form a group."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchreg._checks import nonnegative
from torchreg._distributed import ReduceGroup, ShardLayout
from torchreg._tensors import Step
from torchreg.penalties.functional import _threshold_groups, group_soft_threshold


@dataclass(frozen=True)
class Groups(ABC):
    """A division of a weight's entries into groups of one size.

    A geometry names the dimensions that each group spans. Reductions over them with `keepdim` give one number a group,
    which broadcasts back against the weight, so nothing is copied or moved.

    >>> w = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    >>> w / Rows().norms(w).clamp(min=1)
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000]])
    """

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
        return self._dim(w)

    @abstractmethod
    def _dim(self, w: Tensor) -> tuple[int, ...]:
        """`dim` for a weight with two or more dimensions."""

    def shape(self, w: Tensor) -> tuple[int, ...]:
        """`w`'s shape with one entry a group: 1 in every dimension that a group spans."""
        dim = self.dim(w)
        return tuple(1 if d in dim else size for d, size in enumerate(w.shape))

    def _whole_shape(self, w: Tensor) -> tuple[int, ...]:
        """`shape` of the whole weight of which `w` is all, or a process's part."""
        return self.shape(w)

    def _part(self, x: Tensor) -> Tensor:
        """Of one number a group of the whole weight, those of the groups in `w`."""
        return x

    def size(self, w: Tensor) -> int:
        """The number of entries in each group."""
        return math.prod([w.shape[d] for d in self.dim(w)])

    def norms(self, w: Tensor) -> Tensor:
        """‖w_g‖₂ of every group, real, in `shape(w)`. Its gradient at a group of zeros is 0."""
        return torch.linalg.vector_norm(w, dim=self.dim(w), keepdim=True)

    def _total(self, x: Tensor) -> Tensor:
        """Σ of one number a group, in `shape(w)`."""
        return x.sum()

    def _soft_threshold(self, w: Tensor, step: Step, radius: Step) -> Tensor:
        """`functional.group_soft_threshold` of these groups with step·radius, the radius being one number a group."""
        return group_soft_threshold(w, step * radius, self.dim(w))


@dataclass(frozen=True)
class Rows(Groups):
    """One group for each index of dimension 0: all that feeds one output, a neuron or a filter.

    Shape:
        w: (outputs, inputs, ...), two or more dimensions: the weight of `nn.Linear` and of convolutions. In a
        transposed convolution dimension 0 is the input.

    >>> Rows().norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[5.],
            [0.]])
    """

    def _dim(self, w: Tensor) -> tuple[int, ...]:
        return tuple(range(1, w.dim()))


@dataclass(frozen=True)
class Columns(Groups):
    """One group for each index of dimension 1: all that one input feeds, in a convolution over outputs and kernel.

    Shape:
        w: (outputs, inputs, ...), two or more dimensions.

    >>> Columns().norms(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
    tensor([[5., 0.]])
    """

    def _dim(self, w: Tensor) -> tuple[int, ...]:
        return (0, *range(2, w.dim()))


@dataclass(frozen=True)
class ShardedGroups(Groups):
    """The groups of a sharded weight, seen from the part of one process: some reach across to others.

    Only what is summed over such a group is exchanged: one number a group, and never a weight.

    Args:
        groups: those of the whole weight.
        shard: how that is divided.
    Shape:
        w: this process's part.
    """

    groups: Groups
    shard: ShardLayout

    def _dim(self, w: Tensor) -> tuple[int, ...]:
        return self.groups._dim(w)

    def size(self, w: Tensor) -> int:
        return math.prod([self.shard.shape[d] for d in self.dim(w)])

    def _whole_shape(self, w: Tensor) -> tuple[int, ...]:
        dim = self.dim(w)
        return tuple(1 if d in dim else size for d, size in enumerate(self.shard.shape))

    def _part(self, x: Tensor) -> Tensor:
        return self.shard.part(x)

    def norms(self, w: Tensor) -> Tensor:
        return self._peers(w).norms(w, self.dim(w))

    def _total(self, x: Tensor) -> Tensor:
        return self._peers(x).once(x.sum())

    def _soft_threshold(self, w: Tensor, step: Step, radius: Step) -> Tensor:
        # A process with a single row must not take a step for each weight for one number a group.
        varies = isinstance(step, Tensor) and step.dim() > 0
        return _threshold_groups(w, step * radius, self.dim(w), varies, self._peers(w))

    def _peers(self, w: Tensor) -> ReduceGroup:
        """The processes that have other parts of the same groups."""
        return self.shard.across(self.dim(w))


class GroupWeights(tuple[float, ...]):
    """One factor ≥ 0 a group. Equal by value; remembers its tensors, so that a training step transfers nothing."""

    _tensors: dict[tuple[torch.device, torch.dtype], Tensor]

    def __new__(cls, values: Sequence[float] | Tensor) -> GroupWeights:
        if isinstance(values, Tensor):
            values = values.tolist()
        if isinstance(values, str) or not hasattr(values, "__iter__"):
            raise TypeError(
                f"group_weights={values!r} is a {type(values).__name__}; give one number a group, as a list or a 1-d "
                "tensor, or None for the square root of the group's size"
            )
        move = "give one factor a group, such as 1.0"
        new = super().__new__(cls, (nonnegative(f"group_weights[{i}]", v, move) for i, v in enumerate(values)))
        new._tensors = {}
        return new

    def __repr__(self) -> str:
        return super().__repr__() if len(self) <= 6 else f"<{len(self)} numbers>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (tuple(self),)

    def on(self, w: Tensor, groups: Groups) -> Tensor:
        """A tensor of `groups.shape(w)` on `w`'s device, in its precision.

        Raises:
            ValueError: `w` has another number of groups.
        """
        shape = groups._whole_shape(w)
        if len(self) != math.prod(shape):
            raise ValueError(
                f"group_weights has {len(self)} entries, and a weight of shape {tuple(w.shape)} has "
                f"{math.prod(shape)} groups in {groups!r}; give one factor a group, or None"
            )
        key = (w.device, w.real.dtype)
        if key not in self._tensors:
            with torch.inference_mode(False):  # a tensor made in inference mode could never meet autograd
                self._tensors[key] = torch.tensor(list(self), dtype=key[1], device=key[0])
        return groups._part(self._tensors[key].view(shape))
