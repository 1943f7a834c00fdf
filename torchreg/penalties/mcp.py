"""MCP, the minimax concave penalty: L1 near zero that fades out, and no pull beyond γλ."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchreg._checks import greater_than
from torchreg._tensors import Step
from torchreg.penalties.concave import Concave
from torchreg.penalties.functional import choose, firm_threshold, geometric_mean, in_range


@dataclass(frozen=True)
class MCP(Concave):
    """Σ λ|w| − w²/(2γ), constant from |w| = γλ on.

    prox(w, step) is the firm threshold: zeros up to λ·step, weights beyond γλ unchanged, a line between. From step = γ
    on it is the hard threshold at λ√(γ·step), where of two minimizers it takes 0.

    The slope is λ − |w|/γ, and 0 from |w| = γλ on. As usual λ is the slope at 0 and also sets the width γλ.

    Args:
        strength: λ ≥ 0, in units of loss per unit of |w|.
        gamma: γ > 0, in units of w per unit of slope. A smaller γ is nearer to L0; as γ → ∞ it is L1.
    Shape:
        w: any shape, floating or complex. The value is a 0-d tensor (float32 or wider); the prox keeps w's
        shape and dtype.
    Raises:
        TypeError: strength or gamma is not a number.
        ValueError: strength is negative, gamma is not positive, or one is infinite or NaN.
    Source: Zhang, 2010; Breheny and Huang, 2011, who take γ = 3 for standardized linear regression.

    >>> MCP(0.5)(torch.tensor([2.0, -0.3]))
    tensor(0.5100)
    >>> MCP(0.5).prox(torch.tensor([2.0, -0.75, 0.25]), step=1.0)
    tensor([ 2.0000, -0.3750,  0.0000])
    """

    strength: float
    gamma: float = 3.0

    name = "mcp"
    formula = "Σ λ|w| − w²/(2γ), constant from |w| = γλ on"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "gamma", greater_than("gamma", self.gamma, 0, "write MCP(1e-4, gamma=3.0)"))

    def value(self, w: Tensor) -> Tensor:
        modulus = w.abs().clamp(max=in_range(self.gamma * self.strength, w))
        return (modulus * (self.strength - modulus / (2 * self.gamma))).sum()

    def prox_map(self, w: Tensor, step: Step) -> Tensor:
        low = self.strength * choose(step < self.gamma, step, geometric_mean(self.gamma, step))
        return firm_threshold(w, low, self.gamma * self.strength)

    def slope(self, modulus: Tensor) -> Tensor:
        return (self.strength - modulus / self.gamma).clamp(min=0)
