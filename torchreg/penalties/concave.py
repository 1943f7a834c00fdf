"""The base of concave penalties of single weights: their slope falls, so that large weights go free."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from torchreg.penalties.base import Penalty, largest, modulus_subgradient, over


class Concave(Penalty):
    """Σω(|w|) with ω increasing and concave: small weights go to zero, large ones are shrunk little or not at all.

    A subclass is a frozen dataclass with one strength, `strength`. Besides `value` and `prox_map` it writes
    `slope(modulus)`, which is all that `stationarity`, `lambda_max` and `Reweighted` need.
    """

    strength: float

    convex = False
    separable = True

    @abstractmethod
    def slope(self, modulus: Tensor) -> Tensor:
        """ω′(modulus): at a kink the slope on its left, at 0 the slope on its right, which may be inf."""

    def nearest_subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        return modulus_subgradient(w, gradient, self.slope(w.abs()))

    def dual_norm(self, gradient: Tensor) -> Tensor:
        top = largest(gradient)
        return over(top, self.slope(torch.zeros_like(top)))
