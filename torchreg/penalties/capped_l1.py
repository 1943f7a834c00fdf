"""Capped L1 = λ Σ min(|w|, θ): L1 up to θ, and a constant price beyond."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchreg._checks import greater_than
from torchreg._tensors import Step
from torchreg.penalties.concave import Concave
from torchreg.penalties.functional import choose, geometric_mean, in_range, soft_threshold


@dataclass(frozen=True)
class CappedL1(Concave):
    """λ Σ min(|w|, θ).

    prox(w, step) is the soft threshold up to |w| = θ + λ·step/2, and `w` unchanged beyond. From λ·step = 2θ on it is
    the hard threshold at √(2θλ·step). Of the two minimizers at the jump it takes the smaller.

    The slope is λ up to |w| = θ, and 0 beyond.

    Args:
        strength: λ ≥ 0, in units of loss per unit of |w|.
        theta: θ > 0, in units of w: larger weights are not shrunk.
    Shape:
        w: any shape, floating or complex. The value is a 0-d tensor (float32 or wider); the prox keeps w's
        shape and dtype.
    Raises:
        TypeError: strength or theta is not a number.
        ValueError: strength is negative, theta is not positive, or one is infinite or NaN.
    Source: Zhang, 2010 (multi-stage convex relaxation); Gong et al., 2013, for the prox.

    >>> CappedL1(0.5, theta=1.0)(torch.tensor([2.0, -0.25]))
    tensor(0.6250)
    >>> CappedL1(0.5, theta=1.0).prox(torch.tensor([2.0, -0.75, 0.25]), step=1.0)
    tensor([ 2.0000, -0.2500,  0.0000])
    """

    strength: float
    theta: float

    name = "capped_l1"
    formula = "λ Σ min(|w|, θ)"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "theta", greater_than("theta", self.theta, 0, "write CappedL1(1e-4, theta=0.1)"))

    def value(self, w: Tensor) -> Tensor:
        return self.strength * w.abs().clamp(max=in_range(self.theta, w)).sum()

    def prox_map(self, w: Tensor, step: Step) -> Tensor:
        threshold = self.strength * step
        jump = choose(threshold < 2 * self.theta, self.theta + threshold / 2, geometric_mean(2 * self.theta, threshold))
        return torch.where(w.abs() > in_range(jump, w), w, soft_threshold(w, threshold))

    def slope(self, modulus: Tensor) -> Tensor:
        return self.strength * (modulus <= self.theta).to(modulus.dtype)
