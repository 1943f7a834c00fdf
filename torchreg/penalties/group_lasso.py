"""Group lasso = λ Σ_g weight_g·‖w_g‖₂: whole rows or columns of zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreg._tensors import Step
from torchreg.penalties.base import indicator, largest, over
from torchreg.penalties.group_penalty import GroupPenalty, normalized
from torchreg.penalties.groups import Groups, Rows


@dataclass(frozen=True)
class GroupLasso(GroupPenalty):
    """λ Σ_g weight_g·‖w_g‖₂.

    prox(w, step) = w_g·max(1 − step·λ·weight_g/‖w_g‖₂, 0), the group soft threshold: whole groups of exact zeros. With
    a step for each weight it is w·r/(r + step·λ·weight_g), where r is the root of one equation per group, and a group
    is zero iff ‖w_g/step‖₂ ≤ λ·weight_g.

    The gradient is λ·weight_g·w_g/‖w_g‖₂, and 0 at a group of zeros.

    Args:
        strength: λ ≥ 0, in units of loss per unit of ‖w_g‖₂.
        groups: `Rows()`, one group per output, or `Columns()`, one per input.
        group_weights: one number ≥ 0 per group; None is √|g|, the root of the number of its entries: then λ
            means the same for groups of any size.
    Shape:
        w: two or more dimensions, floating or complex. The value is a 0-d tensor (float32 or wider); the prox keeps
        w's shape and dtype.
    Raises:
        TypeError: strength or a group weight is not a number, or `groups` is not a Groups.
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

    name = "group_lasso"
    formula = "λ Σ_g weight_g·‖w_g‖₂"

    def value(self, w: Tensor) -> Tensor:
        return self.strength * self.groups.total(self.weight_of_groups(w) * self.groups.norms(w))

    def prox_map(self, w: Tensor, step: Step) -> Tensor:
        return self.groups.soft_threshold(w, step, self.strength * self.weight_of_groups(w))

    def nearest_subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        radius = self.strength * self.weight_of_groups(w)
        return torch.where(
            self.groups.norms(w) != 0,
            radius * normalized(w, self.groups),
            -gradient + self.groups.soft_threshold(gradient, 1.0, radius),  # −gradient, projected on the ball
        )

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return largest(over(self.groups.norms(gradient), self.strength * self.weight_of_groups(gradient)))

    def conjugate(self, v: Tensor) -> Tensor:
        return indicator(self.groups.norms(v) <= self.strength * self.weight_of_groups(v))
