"""Weighted L1 = λ Σ v·|w|: a strength for each weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchreg._tensors import Step
from torchreg.penalties.base import Penalty, indicator, largest, modulus_subgradient, over
from torchreg.penalties.functional import soft_threshold


@dataclass(frozen=True, eq=False)
class WeightedL1(Penalty):
    """λ Σ v·|w|.

    prox(w, step) = sign(w)·max(|w| − step·λ·v, 0), the soft threshold: exact zeros.

    Users write `Reweighted(penalty)`, which makes a WeightedL1 for each parameter and step.

    Args:
        strength: λ ≥ 0, in units of loss per unit of v·|w|.
        weights: v ≥ 0, a real tensor that broadcasts against `w`, or against this process's part of a sharded `w`. It
            is not validated.
    Shape:
        w: any shape against which `weights` broadcasts, floating or complex.
    Source: Zou, 2006 (the adaptive lasso).

    >>> WeightedL1(0.5, torch.tensor([1.0, 4.0])).prox(torch.tensor([3.0, 1.25]), step=1.0)
    tensor([2.5000, 0.0000])
    """

    strength: float
    weights: Tensor

    name = "weighted_l1"
    formula = "λ Σ v·|w|"
    convex = True
    separable = True

    def value(self, w: Tensor) -> Tensor:
        return (self._limit(w) * w.abs()).sum()

    def prox_map(self, w: Tensor, step: Step) -> Tensor:
        return soft_threshold(w, step * self._limit(w))

    def nearest_subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        return modulus_subgradient(w, gradient, self._limit(w))

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return largest(over(gradient.abs(), self._limit(gradient)))

    def conjugate(self, v: Tensor) -> Tensor:
        return indicator(v.abs() <= self._limit(v))

    def _limit(self, w: Tensor) -> Tensor:
        """λ·v in the precision of `w`."""
        return self.strength * self.weights.to(w.real.dtype)
