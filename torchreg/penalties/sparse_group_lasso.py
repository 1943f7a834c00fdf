"""Sparse group lasso = λ₁Σ|w| + λ₂ Σ_g weight_g·‖w_g‖₂: zero groups, and zeros within the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchreg._tensors import Step
from torchreg.penalties.base import indicator, largest, over
from torchreg.penalties.functional import soft_threshold
from torchreg.penalties.group_lasso import GroupPenalty, normalized
from torchreg.penalties.groups import Groups, Rows


@dataclass(frozen=True, repr=False)
class SparseGroupLasso(GroupPenalty):
    """λ₁Σ|w| + λ₂ Σ_g weight_g·‖w_g‖₂.

    prox(w, step) is the soft threshold with step·λ₁, then the group soft threshold with step·λ₂·weight_g. That is exact
    for a step of each weight too: the second keeps every sign and every zero, so what the first took off remains a
    subgradient of λ₁Σ|w| where the second arrives.

    The gradient is λ₁·sign(w) + λ₂·weight_g·w_g/‖w_g‖₂, and 0 at a group of zeros.

    Args:
        l1: λ₁ ≥ 0, in units of loss per unit of |w|.
        group: λ₂ ≥ 0, in units of loss per unit of ‖w_g‖₂.
        groups: `Rows()`, one group an output, or `Columns()`, one an input.
        group_weights: one number ≥ 0 a group; None is √|g|, the root of the number of its entries.
    Shape:
        w: two or more dimensions, floating or complex. The value is a 0-d tensor (float32 or wider); the prox keeps
        w's shape and dtype.
    Raises:
        TypeError: a strength or a group weight is not a number, or `groups` is no geometry.
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

    name: ClassVar[str] = "sparse_group_lasso"
    formula: ClassVar[str] = "λ₁Σ|w| + λ₂ Σ_g weight_g·‖w_g‖₂"
    strengths: ClassVar[tuple[str, ...]] = ("l1", "group")
    convex: ClassVar[bool] = True
    separable: ClassVar[bool] = False
    smooth: ClassVar[bool] = False

    def _value(self, w: Tensor) -> Tensor:
        return self.l1 * w.abs().sum() + self.group * self.groups._total(self._weights(w) * self.groups.norms(w))

    def _prox(self, w: Tensor, step: Step) -> Tensor:
        sparse = soft_threshold(w, step * self.l1)
        return self.groups._soft_threshold(sparse, step, self.group * self._weights(w))

    def _subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        radius = self.group * self._weights(w)
        left = soft_threshold(gradient, self.l1)
        return torch.where(
            w != 0,
            self.l1 * w.sgn() + radius * normalized(w, self.groups),
            # At a zero within a live group the norm is smooth, with slope 0; at a zero group it takes what it can.
            torch.where(self.groups.norms(w) != 0, left, self.groups._soft_threshold(left, 1.0, radius)) - gradient,
        )

    def _dual_norm(self, gradient: Tensor) -> Tensor:
        """The largest over groups of the c with ‖soft(g, c·λ₁)‖ = c·λ₂·weight_g (the ε-norm of Burdakov)."""
        modulus = gradient.abs()
        if self.group == 0 or modulus.numel() == 0:
            return largest(over(modulus, self.l1))
        radius, norms = self.group * self._weights(gradient), self.groups.norms(gradient)
        if self.l1 == 0:
            return largest(over(norms, radius))
        dim, root_of_size = self.groups.dim(gradient), math.sqrt(self.groups.size(gradient))
        # Two bounds from below, whatever the rest of the group: by its largest entry, and by the triangle inequality.
        top = modulus.amax(dim, keepdim=True)
        c = torch.maximum(top / (self.l1 + radius), norms / (self.l1 * root_of_size + radius))
        for _ in range(NEWTON_STEPS):  # ‖soft(g, c·λ₁)‖ − c·radius is convex and falls: c rises to its root
            left = (modulus - c * self.l1).clamp(min=0)
            norm = torch.linalg.vector_norm(left, dim=dim, keepdim=True)
            slope = self.l1 * left.sum(dim, keepdim=True) / torch.where(norm == 0, 1.0, norm) + radius
            c = c + (norm - c * radius) / torch.where(slope == 0, 1.0, slope)
        return c.amax()

    def _conjugate(self, v: Tensor) -> Tensor:
        norms = self.groups.norms(soft_threshold(v, self.l1))
        return indicator(norms <= self.group * self._weights(v))


NEWTON_STEPS = 8
"""6 gave full precision in float64 for every group and pair of strengths that was tried."""
