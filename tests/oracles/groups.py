"""λ₁Σ|w| + λ₂ Σ_g √|g|·‖w_g‖: the value to 40 digits, the prox by bisection on its optimality condition."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np


@dataclass(frozen=True)
class Grouped:
    """A sparse group lasso; with l1 = 0 a group lasso.

    Attributes:
        axis: each group is all that has one index there.
        weights: one number a group; None is √|g|.
    """

    l1: float
    group: float
    axis: int = 0
    weights: tuple[float, ...] | None = None

    @property
    def is_kinked(self) -> bool:
        """The prox makes zeros."""
        return self.l1 > 0 or self.group > 0

    def value(self, w: np.ndarray) -> float:
        """The sum in 40 digits (but for a complex number's modulus in Σ|w|)."""
        with localcontext() as context:
            context.prec = 40
            total = Decimal(0)
            rows = np.moveaxis(w, self.axis, 0)
            for i, row in enumerate(rows.reshape(len(rows), -1) if w.size else []):
                squares = sum(Fraction(x.real) ** 2 + Fraction(x.imag) ** 2 for x in row.tolist())
                weight = Decimal(row.size).sqrt() if self.weights is None else Decimal(self.weights[i])
                total += Decimal(self.group) * weight * _decimal(squares).sqrt()
                total += Decimal(self.l1) * _decimal(sum(Fraction(abs(x)) for x in row.tolist()))
            return float(total)

    def prox(self, w: np.ndarray, step: float | np.ndarray) -> np.ndarray:
        """argmin_u Σ ½|u − w|²/step + Ω(u).

        With r = ‖u_g‖ > 0 the optimal |u| is m = r·max(|w| − step·λ₁, 0)/(r + step·λ₂·weight), and r is where ‖m‖ = r.
        It is zero iff some subgradient at 0 reaches w/step: ‖max(|w| − step·λ₁, 0)/step‖ ≤ λ₂·weight.
        """
        if w.size == 0:
            return w.copy()
        modulus, step = np.abs(w), np.broadcast_to(step, w.shape)
        left = np.maximum(modulus - step * self.l1, 0)
        threshold = step * self.group * self._weights(w.shape)
        safe = np.where(threshold > 0, threshold, 1.0)
        slopes = np.where(threshold > 0, left / safe, np.where(left > 0, np.inf, 0.0))
        zero = self._norm(slopes) <= 1
        low, high = np.zeros(zero.shape), self._norm(left)
        for _ in range(300):
            middle = (low + high) / 2
            beyond = self._norm(left / np.where(left > 0, middle + threshold, 1.0)) <= 1
            low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
        kept = left * (high / np.where(high > 0, high + threshold, 1.0))
        return np.where(zero, 0.0, w * (kept / np.where(modulus > 0, modulus, 1.0)))

    def scale(self, modulus: np.ndarray) -> np.ndarray:
        """What the rounding errors of one entry are relative to: the norm of its group."""
        return np.broadcast_to(self._norm(modulus), modulus.shape)

    def touched(self, hit: np.ndarray) -> np.ndarray:
        """What depends on the entries `hit`: their groups."""
        return np.broadcast_to(hit.any(axis=self._span(hit.ndim), keepdims=True), hit.shape)

    def takes(self, shape: tuple[int, ...]) -> bool:
        """The penalty is defined on that shape."""
        return len(shape) >= 2

    def _span(self, ndim: int) -> tuple[int, ...]:
        return tuple(d for d in range(ndim) if d != self.axis)

    def _norm(self, x: np.ndarray) -> np.ndarray:
        return np.sqrt(np.square(np.abs(x)).sum(axis=self._span(x.ndim), keepdims=True))

    def _weights(self, shape: tuple[int, ...]) -> np.ndarray:
        count = shape[self.axis]
        weights = np.full(count, np.sqrt(np.prod(shape) / count)) if self.weights is None else np.array(self.weights)
        return weights.reshape([count if d == self.axis else 1 for d in range(len(shape))])


def _decimal(x: Fraction | int) -> Decimal:
    return Decimal(Fraction(x).numerator) / Decimal(Fraction(x).denominator)
