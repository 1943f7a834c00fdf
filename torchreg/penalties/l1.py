"""L1 = λΣ|w|: sparse weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchreg._tensors import Step
from torchreg.penalties.base import Penalty, indicator, largest, modulus_subgradient, over
from torchreg.penalties.coefficients import L1L2
from torchreg.penalties.functional import in_range, soft_threshold


@dataclass(frozen=True)
class L1(Penalty):
    """λΣ|w|.

    prox(w, step) = sign(w)·max(|w| − step·λ, 0), the soft threshold: exact zeros.

    The gradient is λ·sign(w), and 0 at w = 0. For complex weights |w| is the modulus.

    Args:
        strength: λ ≥ 0, in units of loss per unit of |w|.
    Shape:
        w: any shape, floating or complex. The value is a 0-d tensor (float32 or wider); the prox keeps w's
        shape and dtype.
    Raises:
        TypeError: strength is not a number.
        ValueError: strength is negative, infinite or NaN.
    Source: Tibshirani, 1996; Daubechies et al., 2004 for the prox.

    >>> L1(0.5)(torch.tensor([2.0, -0.25]))
    tensor(1.1250)
    >>> L1(0.5).prox(torch.tensor([2.0, -0.25]), step=1.0)
    tensor([1.5000, 0.0000])
    """

    strength: float

    name = "l1"
    formula = "λΣ|w|"
    convex = True
    separable = True

    def value(self, w: Tensor) -> Tensor:
        return self.strength * w.abs().sum()

    def prox_map(self, w: Tensor, step: Step) -> Tensor:
        return soft_threshold(w, step * self.strength)

    def coefficients(self) -> L1L2:
        return L1L2(self.strength, 0.0)

    def nearest_subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        return modulus_subgradient(w, gradient, in_range(self.strength, w))

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return over(largest(gradient), self.strength)

    def conjugate(self, v: Tensor) -> Tensor:
        return indicator(v.abs() <= self.strength)
