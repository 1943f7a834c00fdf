"""Penalties Σ ω(|w|): the value in exact fractions, the prox by bisection on its optimality condition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from torch import Tensor


def to_numpy(w: Tensor) -> np.ndarray:
    """`w` in double precision, which holds every narrower number exactly."""
    return w.detach().resolve_conj().numpy().astype("c16") if w.is_complex() else w.detach().double().numpy()


@dataclass(frozen=True)
class Separable:
    """Σ ω(|w|) for a convex ω with its minimum at 0.

    Attributes:
        omega: ω at a modulus m ≥ 0.
        slope: its derivative, at 0 the one from the right: the subgradients there are all of [−slope(0), slope(0)].
    """

    omega: Callable[[Fraction], Fraction]
    slope: Callable[[np.ndarray], np.ndarray]

    @property
    def is_kinked(self) -> bool:
        """ω has a kink at 0, so the prox makes zeros."""
        return bool(self.slope(np.zeros(1))[0] > 0)

    def value(self, w: np.ndarray) -> float:
        """The sum without a single rounding (but that of a complex number's modulus)."""
        return float(sum((self.omega(Fraction(abs(x))) for x in w.ravel().tolist()), Fraction(0)))

    def prox(self, w: np.ndarray, step: float | np.ndarray) -> np.ndarray:
        """argmin_u Σ ½|u − w|²/step + Ω(u): along each w the m with 0 ∈ m − |w| + step·∂ω(m), which increases in m."""
        modulus = np.abs(w)
        low, high = np.zeros_like(modulus), modulus.copy()
        zero = step * self.slope(low) >= modulus
        for _ in range(100):
            middle = (low + high) / 2
            beyond = middle - modulus + step * self.slope(middle) >= 0
            low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
        return np.where(zero, 0.0, w * (high / np.where(modulus > 0, modulus, 1.0)))

    def scale(self, modulus: np.ndarray) -> np.ndarray:
        """What the rounding errors of one entry are relative to: itself."""
        return modulus

    def touched(self, hit: np.ndarray) -> np.ndarray:
        """What depends on the entries `hit`: they alone."""
        return hit

    def takes(self, shape: tuple[int, ...]) -> bool:
        """The penalty is defined on that shape."""
        return True


def l1(strength: float) -> Separable:
    return elastic_net(strength, 0.0)


def l2(strength: float) -> Separable:
    return elastic_net(0.0, strength)


def elastic_net(l1: float, l2: float) -> Separable:
    return Separable(
        omega=lambda m: Fraction(l1) * m + Fraction(l2) * m * m,
        slope=lambda m: l1 + 2 * l2 * m,
    )
