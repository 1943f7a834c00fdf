"""L1 = λΣ|w|: sparse weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchreg._tensors import Step
from torchreg.penalties.base import Penalty, indicator, largest, over
from torchreg.penalties.coefficients import L1L2
from torchreg.penalties.functional import soft_threshold


@dataclass(frozen=True, repr=False)
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

    name: ClassVar[str] = "l1"
    formula: ClassVar[str] = "λΣ|w|"
    strengths: ClassVar[tuple[str, ...]] = ("strength",)
    convex: ClassVar[bool] = True
    separable: ClassVar[bool] = True
    smooth: ClassVar[bool] = False

    def _value(self, w: Tensor) -> Tensor:
        return self.strength * w.abs().sum()

    def _prox(self, w: Tensor, step: Step) -> Tensor:
        return soft_threshold(w, step * self.strength)

    def _soft(self) -> L1L2:
        return L1L2(self.strength, 0.0)

    def _subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        limit = min(self.strength, torch.finfo(w.dtype).max)  # clamp refuses a number beyond the range of w
        at_zero = -gradient.sgn() * gradient.abs().clamp(max=limit)
        return torch.where(w == 0, at_zero, limit * (w / w.abs()))  # the sign of a NaN would be 0

    def _dual_norm(self, gradient: Tensor) -> Tensor:
        return over(largest(gradient), self.strength)

    def _conjugate(self, v: Tensor) -> Tensor:
        return indicator(v.abs() <= self.strength)
