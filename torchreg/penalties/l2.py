"""L2 = λΣw²: small weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchreg._checks import nonnegative
from torchreg._tensors import Step
from torchreg.penalties.base import Penalty, divided, over, sum_of_squares
from torchreg.penalties.coefficients import L1L2


@dataclass(frozen=True)
class L2(Penalty):
    """λΣw².

    prox(w, step) = w / (1 + 2·step·λ): smaller weights, no zeros.

    The gradient is 2λw. Torch's `weight_decay=wd` adds wd·w to the gradient, so that λ = wd/2: use
    `L2.from_weight_decay`. For complex weights w² is the squared modulus.

    Args:
        strength: λ ≥ 0, in units of loss per unit of w².
    Shape:
        w: any shape, floating or complex. The value is a 0-d tensor (float32 or wider); the prox keeps w's
        shape and dtype.
    Raises:
        TypeError: strength is not a number.
        ValueError: strength is negative, infinite or NaN.
    Source: Hoerl and Kennard, 1970.

    >>> L2(0.5)(torch.tensor([2.0, -1.0]))
    tensor(2.5000)
    >>> L2(0.5).prox(torch.tensor([2.0, -1.0]), step=1.0)
    tensor([ 1.0000, -0.5000])
    """

    strength: float

    name = "l2"
    formula = "λΣw²"
    convex = True
    separable = True
    smooth = True

    @classmethod
    def from_weight_decay(cls, weight_decay: float) -> L2:
        """The L2 whose gradient is that of `torch.optim.SGD(weight_decay=...)`: λ = wd/2.

        >>> L2.from_weight_decay(1e-2)
        L2(strength=0.005)
        """
        return cls(nonnegative("weight_decay", weight_decay, "write L2.from_weight_decay(1e-4)") / 2)

    def value(self, w: Tensor) -> Tensor:
        return self.strength * sum_of_squares(w)

    def prox_map(self, w: Tensor, step: Step) -> Tensor:
        return divided(w, 1 + 2 * self.strength * step)

    def coefficients(self) -> L1L2:
        return L1L2(0.0, self.strength)

    def nearest_subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        return 2 * self.strength * w

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return over(gradient.abs().sum(), 0.0)  # no λ holds a weight at 0 against a gradient

    def conjugate(self, v: Tensor) -> Tensor:
        return over(sum_of_squares(v), 4 * self.strength)
