"""Transformed L1 = λ Σ (a + 1)|w|/(a + |w|): between L0 and L1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchreg._checks import greater_than
from torchreg._tensors import Step
from torchreg.penalties.concave import Concave
from torchreg.penalties.functional import geometric_mean, in_range, soft_threshold


@dataclass(frozen=True)
class TransformedL1(Concave):
    """λ Σ (a + 1)|w|/(a + |w|).

    prox(w, step) is the largest root u of (u − |w|)(u + a)² + λ·step·a(a + 1) = 0 with w's sign, or 0, whichever has
    the lower objective; at a tie it is 0. While λ·step ≤ a²/(2(a + 1)) it is continuous, with zeros up to
    λ·step·(a + 1)/a; beyond that it jumps.

    The slope is λ·a(a + 1)/(a + |w|)²: λ(a + 1)/a at 0, and never quite 0.

    Args:
        strength: λ ≥ 0, in units of loss: the price of a weight of size 1.
        a: > 0, in units of w; as a → 0 it is L0, as a → ∞ it is L1.
    Shape:
        w: any shape, floating or complex. The value is a 0-d tensor (float32 or wider); the prox keeps w's
        shape and dtype.
    Raises:
        TypeError: strength or a is not a number.
        ValueError: strength is negative, a is not positive, or one is infinite or NaN.
    Source: Nikolova, 2000; Zhang and Xin, 2017, for the prox.

    >>> TransformedL1(0.5)(torch.tensor([1.0, -1.0, 0.0]))
    tensor(1.)
    >>> TransformedL1(0.5).prox(torch.tensor([2.0, -0.25]), step=1.0)
    tensor([1.8794, 0.0000])
    """

    strength: float
    a: float = 1.0

    name = "transformed_l1"
    formula = "λ Σ (a + 1)|w|/(a + |w|)"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "a", greater_than("a", self.a, 0, "write TransformedL1(1e-4, a=1.0)"))

    def value(self, w: Tensor) -> Tensor:
        modulus = w.abs()
        return self.strength * (self.a + 1) * (modulus / (modulus + self.a)).sum()

    def prox_map(self, w: Tensor, step: Step) -> Tensor:
        a, modulus = self.a, w.abs()
        root = in_range(geometric_mean(self.strength * a * (a + 1), step), w)
        sum_ = modulus + a
        # x = u + a is the largest root of x³ − sum·x² + root² = 0, by the cosine of a third of an angle. 1 − cos would
        # lose all digits of a small angle, and sines keep them.
        sine = (6.75**0.5 * root / sum_ / sum_.sqrt()).clamp(max=1 - torch.finfo(sum_.dtype).eps)
        x = sum_ * (1 - 4 / 3 * (sine.asin() / 3).sin().square())
        shrinkage = (root / x).square()
        with torch.no_grad():
            u = modulus - shrinkage
            zero = ((root / a) * (root / (u + a)) >= modulus - u / 2) & (root > (a**3 / 2) ** 0.5)
        return soft_threshold(w, torch.where(zero, modulus, shrinkage))

    def slope(self, modulus: Tensor) -> Tensor:
        return self.strength * self.a * (self.a + 1) / (modulus + self.a).square()
