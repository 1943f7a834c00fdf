"""What concave penalties of single weights share: a slope that falls, so that large weights go free."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from torchreg._tensors import Step
from torchreg.penalties.base import Penalty, largest, over


class Concave(Penalty):
    """Σω(|w|) with ω increasing and concave: small weights go to zero, large ones are shrunk little or not at all.

    A subclass is a frozen dataclass with one strength, `strength`, and besides `_value` and `_prox` it writes
    `_slope(modulus)`, which is all that `stationarity`, `lambda_max` and `Reweighted` ask for.
    """

    strength: float

    strengths: ClassVar[tuple[str, ...]] = ("strength",)
    convex: ClassVar[bool] = False
    separable: ClassVar[bool] = True
    smooth: ClassVar[bool] = False

    @abstractmethod
    def _slope(self, modulus: Tensor) -> Tensor:
        """ω′(modulus), at a kink from the left, but at 0 from the right: there it may be inf."""

    def _subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        modulus = w.abs()
        slope = self._slope(modulus)
        at_zero = -gradient.sgn() * torch.minimum(gradient.abs(), slope)
        return torch.where(w == 0, at_zero, slope * (w / modulus))  # the sign of a NaN would be 0

    def _dual_norm(self, gradient: Tensor) -> Tensor:
        top = largest(gradient)
        return over(top, self._slope(torch.zeros_like(top)))


def geometric_mean(a: float, b: Step) -> Step:
    """√(a·b), which overflows nowhere."""
    root: Step = a**0.5 * b**0.5
    return root
