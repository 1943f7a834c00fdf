"""Log-sum = λ Σ log(1 + |w|/ε): its pull falls as one over the weight, as in reweighted L1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchreg._checks import greater_than
from torchreg._tensors import Step
from torchreg.penalties.concave import Concave
from torchreg.penalties.functional import geometric_mean, in_range, soft_threshold


@dataclass(frozen=True)
class LogSum(Concave):
    """λ Σ log(1 + |w|/ε).

    prox(w, step) is the larger root u of (u − |w|)(u + ε) + λ·step = 0 with w's sign, or 0, whichever has the lower
    objective; at a tie it is 0. While λ·step ≤ ε² it is continuous, with zeros up to λ·step/ε; beyond that it jumps.

    The slope is λ/(ε + |w|): λ/ε at 0, and never quite 0. Weights larger than ε count as large.

    Args:
        strength: λ ≥ 0, in units of loss.
        epsilon: ε > 0, in units of w, a little below the weights that should stay; as ε → 0 it counts as L0 does.
    Shape:
        w: any shape, floating or complex. The value is a 0-d tensor (float32 or wider); the prox keeps w's
        shape and dtype.
    Raises:
        TypeError: strength or epsilon is not a number.
        ValueError: strength is negative, epsilon is not positive, or one is infinite or NaN.
    Source: Candès, Wakin and Boyd, 2008, who take ε = 0.1 for signals of size 1; Gong et al., 2013, for the prox.

    >>> LogSum(0.5, epsilon=0.5)(torch.tensor([0.5, -0.5, 0.0]))
    tensor(0.6931)
    >>> LogSum(0.5, epsilon=0.5).prox(torch.tensor([2.0, -0.25]), step=1.0)
    tensor([1.7808, 0.0000])
    """

    strength: float
    epsilon: float = 0.1

    name = "log_sum"
    formula = "λ Σ log(1 + |w|/ε)"

    def __post_init__(self) -> None:
        super().__post_init__()
        epsilon = greater_than("epsilon", self.epsilon, 0, "write LogSum(1e-4, epsilon=0.1)")
        object.__setattr__(self, "epsilon", epsilon)

    def value(self, w: Tensor) -> Tensor:
        return self.strength * torch.log1p(w.abs() / self.epsilon).sum()

    def prox_map(self, w: Tensor, step: Step) -> Tensor:
        modulus, root = w.abs(), in_range(geometric_mean(self.strength, step), w)
        sum_ = modulus + self.epsilon
        # q = u + ε is a sum of positive terms, and u = |w| − root²/q. In a formula for u itself digits would cancel.
        # tiny: the gradient of √0 is infinite, and there u is not the minimizer.
        inside = (sum_ - 2 * root).clamp(min=torch.finfo(sum_.dtype).tiny)
        q = (sum_ + inside.sqrt() * (sum_ + 2 * root).sqrt()) / 2
        shrinkage = root * (root / q)
        with torch.no_grad():
            u = modulus - shrinkage
            zero = (root * (root * torch.log1p(u / self.epsilon) / u) >= modulus - u / 2) & (root > self.epsilon)
        return soft_threshold(w, torch.where(zero, modulus, shrinkage))

    def slope(self, modulus: Tensor) -> Tensor:
        return self.strength / (modulus + self.epsilon)
