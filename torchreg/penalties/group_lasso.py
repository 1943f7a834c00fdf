"""Group lasso = λ Σ_g weight_g·‖w_g‖₂: whole rows or columns of zeros."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from torchreg._distributed import ShardLayout
from torchreg._tensors import Step
from torchreg.penalties.base import Penalty, indicator, largest, over
from torchreg.penalties.groups import Groups, GroupWeights, Rows, ShardedGroups

if TYPE_CHECKING:
    from typing_extensions import Self


class GroupPenalty(Penalty):
    """What penalties of group norms share: the geometry and the weight of each group."""

    groups: Groups
    group_weights: Sequence[float] | Tensor | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.groups, Groups):
            raise TypeError(f"groups={self.groups!r} is no geometry; write groups=Rows() or groups=Columns()")
        if self.group_weights is not None and not isinstance(self.group_weights, GroupWeights):
            object.__setattr__(self, "group_weights", GroupWeights(self.group_weights))

    def check(self, w: Tensor) -> None:
        """Raises a ValueError where `w` has fewer than two dimensions, or another number of groups than weights."""
        self._weights(w)

    def _on(self, shard: ShardLayout) -> Self:
        new = object.__new__(type(self))  # unchecked: the strengths of a compiled graph are tensors
        new.__dict__.update(self.__dict__, groups=ShardedGroups(self.groups, shard))
        return new

    def _weights(self, w: Tensor) -> Step:
        """weight_g: a number, or a tensor that broadcasts against the norms of `w`'s groups."""
        if isinstance(self.group_weights, GroupWeights):
            return self.group_weights.on(w, self.groups)
        return math.sqrt(self.groups.size(w))


@dataclass(frozen=True, repr=False)
class GroupLasso(GroupPenalty):
    """λ Σ_g weight_g·‖w_g‖₂.

    prox(w, step) = w_g·max(1 − step·λ·weight_g/‖w_g‖₂, 0), the group soft threshold: whole groups of exact zeros. With
    a step for each weight it is w·r/(r + step·λ·weight_g) with r the root of one equation a group, and a group is zero
    iff ‖w_g/step‖₂ ≤ λ·weight_g.

    The gradient is λ·weight_g·w_g/‖w_g‖₂, and 0 at a group of zeros.

    Args:
        strength: λ ≥ 0, in units of loss per unit of ‖w_g‖₂.
        groups: `Rows()`, one group an output, or `Columns()`, one an input.
        group_weights: one number ≥ 0 a group; None is √|g|, the root of the number of its entries, by which λ means
            the same for groups of any size.
    Shape:
        w: two or more dimensions, floating or complex. The value is a 0-d tensor (float32 or wider); the prox keeps
        w's shape and dtype.
    Raises:
        TypeError: strength or a group weight is not a number, or `groups` is no geometry.
        ValueError: strength or a group weight is negative, infinite or NaN; at use, w has fewer than two dimensions
            or another number of groups than there are weights.
    Source: Yuan and Lin, 2006.

    >>> penalty = GroupLasso(1.0, group_weights=[1.0, 1.0])
    >>> penalty(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    tensor(5.5000)
    >>> penalty.prox(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), step=1.0)
    tensor([[2.4000, 3.2000],
            [0.0000, 0.0000]])
    """

    strength: float
    groups: Groups = Rows()
    group_weights: Sequence[float] | Tensor | None = None

    name: ClassVar[str] = "group_lasso"
    formula: ClassVar[str] = "λ Σ_g weight_g·‖w_g‖₂"
    strengths: ClassVar[tuple[str, ...]] = ("strength",)
    convex: ClassVar[bool] = True
    separable: ClassVar[bool] = False
    smooth: ClassVar[bool] = False

    def _value(self, w: Tensor) -> Tensor:
        return self.strength * self.groups._total(self._weights(w) * self.groups.norms(w))

    def _prox(self, w: Tensor, step: Step) -> Tensor:
        return self.groups._soft_threshold(w, step, self.strength * self._weights(w))

    def _subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        radius = self.strength * self._weights(w)
        return torch.where(
            self.groups.norms(w) != 0,
            radius * normalized(w, self.groups),
            -gradient + self.groups._soft_threshold(gradient, 1.0, radius),  # -gradient, projected on the ball
        )

    def _dual_norm(self, gradient: Tensor) -> Tensor:
        return largest(over(self.groups.norms(gradient), self.strength * self._weights(gradient)))

    def _conjugate(self, v: Tensor) -> Tensor:
        return indicator(self.groups.norms(v) <= self.strength * self._weights(v))


def normalized(w: Tensor, groups: Groups) -> Tensor:
    """w_g/‖w_g‖₂, and 0 where a group is zero."""
    norms = groups.norms(w)
    return w / torch.where(norms == 0, 1.0, norms)
