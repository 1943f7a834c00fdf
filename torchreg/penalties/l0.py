"""L0 = λ·#{w ≠ 0}: a price for each weight, whatever its size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchreg._tensors import Step
from torchreg.penalties.concave import Concave
from torchreg.penalties.functional import geometric_mean, hard_threshold


@dataclass(frozen=True)
class L0(Concave):
    """λ·#{w ≠ 0}.

    prox(w, step) is the hard threshold: zero iff |w| ≤ √(2λ·step). So how large a weight must be to stay depends on the
    step, and thus on the learning rate. Under Adam, whose step is huge for a weight with a small gradient, no weight is
    large enough for long. The gradient is 0: in a loss L0 does nothing but count.

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

    name = "l0"
    formula = "λ·#{w ≠ 0}"

    def value(self, w: Tensor) -> Tensor:
        modulus = w.abs()
        ones = torch.where(modulus.isnan(), modulus, modulus.sign())  # a graph of gradient 0, where != has none
        return self.strength * ones.sum()

    def prox_map(self, w: Tensor, step: Step) -> Tensor:
        return hard_threshold(w, geometric_mean(2 * self.strength, step))

    def slope(self, modulus: Tensor) -> Tensor:
        return torch.zeros_like(modulus).masked_fill(modulus == 0, torch.inf if self.strength else 0.0)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        raise NotImplementedError(
            "L0 has no least strength at which zero is stationary: zero is stationary at every strength, because the "
            "slope at 0 is infinite; choose the strength by the weights that a step should keep, "
            "|w| > √(2·strength·step)"
        )
