"""Sparse group lasso = λ₁Σ|w| + λ₂ Σ_g weight_g·‖w_g‖₂: zero groups, and zeros within the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreg._tensors import Step
from torchreg.penalties.base import indicator, largest, over
from torchreg.penalties.functional import soft_threshold
from torchreg.penalties.group_penalty import GroupPenalty, normalized
from torchreg.penalties.groups import Groups, Rows


@dataclass(frozen=True)
class SparseGroupLasso(GroupPenalty):
    """λ₁Σ|w| + λ₂ Σ_g weight_g·‖w_g‖₂.

    prox(w, step) is the soft threshold at step·λ₁, then the group soft threshold at step·λ₂·weight_g. This is exact for
    a step per weight too: the second map keeps every sign and every zero, so what the first took off is still a
    subgradient of λ₁Σ|w| at the result.

    The gradient is λ₁·sign(w) + λ₂·weight_g·w_g/‖w_g‖₂, and 0 at a group of zeros.

    Args:
        l1: λ₁ ≥ 0, in units of loss per unit of |w|.
        group: λ₂ ≥ 0, in units of loss per unit of ‖w_g‖₂.
        groups: `Rows()`, one group per output, or `Columns()`, one per input.
        group_weights: one number ≥ 0 per group; None is √|g|, the root of the number of its entries.
    Shape:
        w: two or more dimensions, floating or complex. The value is a 0-d tensor (float32 or wider); the prox keeps
        w's shape and dtype.
    Raises:
        TypeError: a strength or a group weight is not a number, or `groups` is not a Groups.
        ValueError: a strength or a group weight is negative, infinite or NaN; at use, w has fewer than two dimensions
            or another number of groups than there are weights.
    Source: Simon, Friedman, Hastie and Tibshirani, 2013.

    >>> penalty = SparseGroupLasso(l1=1.0, group=1.0, group_weights=[1.0, 1.0])
    >>> penalty(torch.tensor([[4.0, -5.0, 0.0], [1.5, 1.5, 0.0]]))
    tensor(20.5244)
    >>> penalty.prox(torch.tensor([[4.0, -5.0, 0.5], [1.5, 1.5, 0.5]]), step=1.0)
    tensor([[ 2.4000, -3.2000,  0.0000],
            [ 0.0000,  0.0000,  0.0000]])
    """

    l1: float
    group: float
    groups: Groups = Rows()
    group_weights: Sequence[float] | Tensor | None = None

    name = "sparse_group_lasso"
    formula = "λ₁Σ|w| + λ₂ Σ_g weight_g·‖w_g‖₂"
    strengths = ("l1", "group")

    def value(self, w: Tensor) -> Tensor:
        return self.l1 * w.abs().sum() + self.group * self.groups.total(self.weight_of_groups(w) * self.groups.norms(w))

    def prox_map(self, w: Tensor, step: Step) -> Tensor:
        sparse = soft_threshold(w, step * self.l1)
        return self.groups.soft_threshold(sparse, step, self.group * self.weight_of_groups(w))

    def nearest_subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        radius = self.group * self.weight_of_groups(w)
        rest = soft_threshold(gradient, self.l1)
        return torch.where(
            w != 0,
            self.l1 * w.sgn() + radius * normalized(w, self.groups),
            # At a zero within a live group the norm has slope 0; a zero group takes off as much as its ball allows.
            torch.where(self.groups.norms(w) != 0, rest, self.groups.soft_threshold(rest, 1.0, radius)) - gradient,
        )

    def dual_norm(self, gradient: Tensor) -> Tensor:
        """The maximum over groups of the root c of ‖soft(g, c·λ₁)‖ = c·λ₂·weight_g, the ε-norm of Burdakov."""
        modulus = gradient.abs()
        if self.group == 0 or modulus.numel() == 0:
            return largest(over(modulus, self.l1))
        radius, norms = self.group * self.weight_of_groups(gradient), self.groups.norms(gradient)
        if self.l1 == 0:
            return largest(over(norms, radius))
        dim, root_of_size = self.groups.dim(gradient), math.sqrt(self.groups.size(gradient))
        # Two lower bounds of the root: by the largest entry of the group, and by the triangle inequality.
        top = modulus.amax(dim, keepdim=True)
        c = torch.maximum(top / (self.l1 + radius), norms / (self.l1 * root_of_size + radius))
        for _ in range(NEWTON_STEPS):  # ‖soft(g, c·λ₁)‖ − c·radius is convex and falls: c rises to its root
            rest = (modulus - c * self.l1).clamp(min=0)
            norm = torch.linalg.vector_norm(rest, dim=dim, keepdim=True)
            slope = self.l1 * rest.sum(dim, keepdim=True) / torch.where(norm == 0, 1.0, norm) + radius
            c = c + (norm - c * radius) / torch.where(slope == 0, 1.0, slope)
        return c.amax()

    def conjugate(self, v: Tensor) -> Tensor:
        norms = self.groups.norms(soft_threshold(v, self.l1))
        return indicator(norms <= self.group * self.weight_of_groups(v))


NEWTON_STEPS = 8
"""Two more than gave full precision in float64 for every group and pair of strengths that was tried."""
