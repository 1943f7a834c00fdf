"""L0 = λ·#{w ≠ 0}: a price for each weight, whatever its size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchreg._tensors import Step
from torchreg.penalties.concave import Concave, geometric_mean
from torchreg.penalties.functional import hard_threshold


@dataclass(frozen=True, repr=False)
class L0(Concave):
    """λ·#{w ≠ 0}.

    prox(w, step) is the hard threshold: zero iff |w| ≤ √(2λ·step). So how large a weight must be to stay depends on the
    step, that is on the learning rate; under Adam, whose step is huge for a weight with a small gradient, none is
    large enough for long. Its gradient is 0, so that in a loss it does nothing but count.

    Args:
        strength: λ ≥ 0, in units of loss per weight.
    Shape:
        w: any shape, floating or complex. The value is a 0-d tensor (float32 or wider); the prox keeps w's
        shape and dtype.
    Raises:
        TypeError: strength is not a number.
        ValueError: strength is negative, infinite or NaN.
    Source: Blumensath and Davies, 2008.

    >>> L0(0.5)(torch.tensor([2.0, 0.0, -0.25]))
    tensor(1.)
    >>> L0(0.5).prox(torch.tensor([2.0, 1.0, -0.25]), step=1.0)
    tensor([2., 0., 0.])
    """

    strength: float

    name: ClassVar[str] = "l0"
    formula: ClassVar[str] = "λ·#{w ≠ 0}"

    def _value(self, w: Tensor) -> Tensor:
        modulus = w.abs()
        ones = torch.where(modulus.isnan(), modulus, modulus.sign())  # a graph of gradient 0, where != has none
        return self.strength * ones.sum()

    def _prox(self, w: Tensor, step: Step) -> Tensor:
        return hard_threshold(w, geometric_mean(2 * self.strength, step))

    def _slope(self, modulus: Tensor) -> Tensor:
        return torch.zeros_like(modulus).masked_fill(modulus == 0, torch.inf if self.strength else 0.0)

    def _dual_norm(self, gradient: Tensor) -> Tensor:
        raise NotImplementedError(
            "L0 has no least strength at which zero is stationary: it is so at any, as the slope at 0 is infinite; "
            "choose the strength by the weights that a step is to keep, |w| > √(2·strength·step)"
        )
