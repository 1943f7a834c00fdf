"""SCAD, smoothly clipped absolute deviation: L1 up to λ, then less and less, and no pull beyond aλ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchreg._checks import greater_than
from torchreg._tensors import Step
from torchreg.penalties.concave import Concave
from torchreg.penalties.functional import choose, firm_threshold, geometric_mean, in_range, soft_threshold


@dataclass(frozen=True)
class SCAD(Concave):
    """Σ λ|w| − max(|w| − λ, 0)²/(2(a − 1)), constant from |w| = aλ on.

    prox(w, step) is the soft threshold up to |w| = λ(1 + step), weights beyond aλ unchanged, and a line between. For
    a − 1 ≤ step < a + 1 the line is a jump at λ(a + 1 + step)/2, and from step = a + 1 on the prox is the hard
    threshold at λ√((a + 1)·step). Of the two minimizers at a jump it takes the smaller.

    The slope is λ up to |w| = λ, then (aλ − |w|)/(a − 1), and 0 from |w| = aλ on. As usual λ is the slope at 0 and also
    sets the widths.

    Args:
        strength: λ ≥ 0, in units of loss per unit of |w|.
        a: > 1, where the slope ends, in units of λ; as a → ∞ it is L1.
    Shape:
        w: any shape, floating or complex. The value is a 0-d tensor (float32 or wider); the prox keeps w's
        shape and dtype.
    Raises:
        TypeError: strength or a is not a number.
        ValueError: strength is negative, a is not more than 1, or one is infinite or NaN.
    Source: Fan and Li, 2001, who take a = 3.7.

    >>> SCAD(0.5)(torch.tensor([2.0, -0.3]))
    tensor(0.7375)
    >>> SCAD(0.5).prox(torch.tensor([2.0, -0.75, 0.25]), step=1.0)
    tensor([ 2.0000, -0.2500,  0.0000])
    """

    strength: float
    a: float = 3.7

    name = "scad"
    formula = "Σ λ|w| − max(|w| − λ, 0)²/(2(a − 1)), constant from |w| = aλ on"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "a", greater_than("a", self.a, 1, "write SCAD(1e-4, a=3.7)"))

    def value(self, w: Tensor) -> Tensor:
        modulus = w.abs().clamp(max=in_range(self.a * self.strength, w))
        return (self.strength * modulus - (modulus - self.strength).relu().square() / (2 * (self.a - 1))).sum()

    def prox_map(self, w: Tensor, step: Step) -> Tensor:
        a, end = self.a, self.a * self.strength
        knee = choose(step < a - 1, 1 + step, (a + 1 + step) / 2)
        knee = self.strength * choose(step < a + 1, knee, geometric_mean(a + 1, step))
        low = choose(step < a - 1, end / (a - 1) * step, end)  # the line shrinks to a jump at `end`
        soft = soft_threshold(w, self.strength * step)
        return torch.where(w.abs() > in_range(knee, w), firm_threshold(w, low, end), soft)

    def slope(self, modulus: Tensor) -> Tensor:
        return ((self.a * self.strength - modulus) / (self.a - 1)).clamp(
            0, min(self.strength, torch.finfo(modulus.dtype).max)
        )
