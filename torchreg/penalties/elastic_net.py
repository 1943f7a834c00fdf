"""Elastic net = λ₁Σ|w| + λ₂Σw²: sparse weights that share the load of correlated inputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchreg._checks import nonnegative
from torchreg._tensors import Step
from torchreg.penalties.base import Penalty, divided, sum_of_squares
from torchreg.penalties.coefficients import L1L2
from torchreg.penalties.functional import soft_threshold
from torchreg.penalties.l1 import L1


@dataclass(frozen=True)
class ElasticNet(Penalty):
    """λ₁Σ|w| + λ₂Σw².

    prox(w, step) = soft(w, step·λ₁) / (1 + 2·step·λ₂), with soft the soft threshold: exact zeros.

    The gradient is λ₁·sign(w) + 2λ₂w. For complex weights |w| is the modulus.

    Args:
        l1: λ₁ ≥ 0, in units of loss per unit of |w|.
        l2: λ₂ ≥ 0, in units of loss per unit of w².
    Shape:
        w: any shape, floating or complex. The value is a 0-d tensor (float32 or wider); the prox keeps w's
        shape and dtype.
    Raises:
        TypeError: a strength is not a number.
        ValueError: a strength is negative, infinite or NaN.
    Source: Zou and Hastie, 2005.

    >>> ElasticNet(l1=0.5, l2=0.25)(torch.tensor([2.0, -0.25]))
    tensor(2.1406)
    >>> ElasticNet(l1=0.5, l2=0.25).prox(torch.tensor([2.0, -0.25]), step=1.0)
    tensor([1., 0.])
    """

    l1: float
    l2: float

    name = "elastic_net"
    formula = "λ₁Σ|w| + λ₂Σw²"
    strengths = ("l1", "l2")
    convex = True
    separable = True

    @classmethod
    def from_ratio(cls, strength: float, l1_ratio: float) -> ElasticNet:
        """strength·(l1_ratio·Σ|w| + (1 − l1_ratio)·Σw²).

        >>> ElasticNet.from_ratio(0.5, l1_ratio=0.75)
        ElasticNet(l1=0.375, l2=0.125)
        """
        strength = nonnegative("strength", strength, "write ElasticNet.from_ratio(1e-4, l1_ratio=0.5)")
        ratio = _ratio(l1_ratio)
        return cls(l1=strength * ratio, l2=strength * (1 - ratio))

    @classmethod
    def from_sklearn(cls, alpha: float, l1_ratio: float = 0.5) -> ElasticNet:
        """alpha·(l1_ratio·Σ|w| + ½(1 − l1_ratio)·Σw²), the penalty of `sklearn.linear_model.ElasticNet`.

        Scikit-learn adds it to ½·MSE. `nn.MSELoss` has no ½, so double `alpha` for it. Lasso is `l1_ratio=1`. Ridge has
        another convention: it adds alpha·Σw² to the sum of squares, which is `L2(alpha / n)` with `nn.MSELoss` on n
        samples.

        >>> ElasticNet.from_sklearn(0.5, l1_ratio=0.5)
        ElasticNet(l1=0.25, l2=0.125)
        """
        alpha = nonnegative("alpha", alpha, "write ElasticNet.from_sklearn(0.1, l1_ratio=0.5)")
        ratio = _ratio(l1_ratio)
        return cls(l1=alpha * ratio, l2=alpha * (1 - ratio) / 2)

    def value(self, w: Tensor) -> Tensor:
        return self.l1 * w.abs().sum() + self.l2 * sum_of_squares(w)

    def prox_map(self, w: Tensor, step: Step) -> Tensor:
        return divided(soft_threshold(w, step * self.l1), 1 + 2 * self.l2 * step)  # a huge step times l2 = 0 is 0

    def coefficients(self) -> L1L2:
        return L1L2(self.l1, self.l2)

    def nearest_subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        smooth = 2 * self.l2 * w
        return smooth + L1(self.l1).nearest_subgradient(w, gradient + smooth)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return L1(self.l1).dual_norm(gradient)  # at 0 the square has no slope

    def conjugate(self, v: Tensor) -> Tensor:
        if self.l2 == 0:
            return L1(self.l1).conjugate(v)
        return sum_of_squares(soft_threshold(v, self.l1)) / (4 * self.l2)


def _ratio(l1_ratio: float) -> float:
    """`l1_ratio` if it is between 0 and 1, else an error."""
    ratio = nonnegative("l1_ratio", l1_ratio, "it is the share of L1, between 0 and 1")
    if ratio > 1:
        raise ValueError(f"l1_ratio={l1_ratio!r} must be at most 1; it is the share of L1, between 0 and 1")
    return ratio
