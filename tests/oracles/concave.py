"""Concave penalties Σ ω(|w|): the value to 40 digits, the prox by a search of the whole of [0, |w|]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np

from tests.oracles.separable import Separable

GRID, BISECTIONS = 1000, 60


@dataclass(frozen=True)
class Concave(Separable):
    """Σ ω(|w|) for an ω that increases, so that the prox lies between 0 and w.

    Attributes:
        omega: ω at a modulus m ≥ 0, given as a Fraction, without a rounding or to 40 digits.
        slope: its derivative in double precision, at 0 the one from the right.
        omegas: ω in double precision.
    """

    omegas: Callable[[np.ndarray], np.ndarray]

    def value(self, w: np.ndarray) -> float:
        """The sum to 40 digits (but for a complex number's modulus)."""
        with localcontext() as context:
            context.prec = 40
            return float(sum((_decimal(self.omega(Fraction(abs(x)))) for x in w.ravel().tolist()), Decimal(0)))

    def prox(self, w: np.ndarray, step: float | np.ndarray) -> np.ndarray:
        """The best of 0, w, and the root of the optimality condition beside the best point of a grid."""
        modulus = np.abs(w)
        step = np.broadcast_to(step, modulus.shape)
        share = np.arange(GRID + 1).reshape(-1, *[1] * modulus.ndim) / GRID
        best = self.objective(share * modulus, modulus, step).argmin(0)
        low, high = (np.clip(best + d, 0, GRID) / GRID * modulus for d in (-1, 1))
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            beyond = middle - modulus + step * self.slope(middle) >= 0
            low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
        chosen = np.zeros_like(modulus)
        for rival in (high, modulus):
            better = self.objective(rival, modulus, step) < self.objective(chosen, modulus, step)
            chosen = np.where(better, rival, chosen)
        return np.where(chosen == 0, 0.0, w * (chosen / np.where(modulus > 0, modulus, 1.0)))

    def objective(self, u: np.ndarray, modulus: np.ndarray, step: np.ndarray) -> np.ndarray:
        """½(u − |w|)² + step·ω(u): what the prox makes least, entry by entry."""
        return (u - modulus) ** 2 / 2 + step * self.omegas(u)

    def condition(self, u: np.ndarray, step: float | np.ndarray) -> np.ndarray:
        """By how much the prox enlarges an error of w where it arrives at u: 1/(1 + step·ω″(u)), at least 1."""
        u = np.abs(u)
        h = 1e-6 * np.where(u > 0, u, 1.0)
        with np.errstate(divide="ignore"):
            bend = step * (self.slope(u + h) - self.slope(np.maximum(u - h, h))) / (2 * h)
            return 1 / np.clip(1 + bend, 1e-12, 1)


def mcp(strength: float, gamma: float = 3.0) -> Concave:
    λ, γ = Fraction(strength), Fraction(gamma)
    return Concave(
        omega=lambda m: λ * m - m * m / (2 * γ) if m <= γ * λ else γ * λ * λ / 2,
        slope=lambda m: np.where(m < gamma * strength, strength - m / gamma, 0.0),
        omegas=lambda m: np.where(
            m < gamma * strength, strength * m - m**2 / (2 * gamma), gamma * strength * strength / 2
        ),
    )


def scad(strength: float, a: float = 3.7) -> Concave:
    λ, α = Fraction(strength), Fraction(a)

    def omega(m: Fraction) -> Fraction:
        if m <= λ:
            return λ * m
        return (2 * α * λ * m - m * m - λ * λ) / (2 * (α - 1)) if m <= α * λ else λ * λ * (α + 1) / 2

    def omegas(m: np.ndarray) -> np.ndarray:
        middle = (2 * a * strength * m - m**2 - strength**2) / (2 * (a - 1))
        return np.where(m <= strength, strength * m, np.where(m <= a * strength, middle, strength**2 * (a + 1) / 2))

    def slope(m: np.ndarray) -> np.ndarray:
        return np.where(m <= strength, strength, np.maximum(a * strength - m, 0.0) / (a - 1))

    return Concave(omega, slope, omegas)


def l0(strength: float) -> Concave:
    return Concave(
        omega=lambda m: Fraction(strength) * (m != 0),
        slope=lambda m: np.where((m == 0) & (strength > 0), np.inf, 0.0),
        omegas=lambda m: strength * (m != 0),
    )


def log_sum(strength: float, epsilon: float = 0.1) -> Concave:
    return Concave(
        omega=lambda m: Decimal(strength) * (1 + _decimal(m) / Decimal(epsilon)).ln(),
        slope=lambda m: strength / (epsilon + m),
        omegas=lambda m: strength * np.log1p(m / epsilon),
    )


def transformed_l1(strength: float, a: float = 1.0) -> Concave:
    λ, α = Fraction(strength), Fraction(a)
    return Concave(
        omega=lambda m: λ * (α + 1) * m / (α + m),
        slope=lambda m: strength * (a + 1) * a / (a + m) ** 2,
        omegas=lambda m: strength * (a + 1) * (m / (a + m)),
    )


def capped_l1(strength: float, theta: float) -> Concave:
    return Concave(
        omega=lambda m: Fraction(strength) * min(m, Fraction(theta)),
        slope=lambda m: np.where(m < theta, strength, 0.0),
        omegas=lambda m: strength * np.minimum(m, theta),
    )


def _decimal(x: Fraction | Decimal | int) -> Decimal:
    if isinstance(x, Decimal):
        return x
    return Decimal(Fraction(x).numerator) / Decimal(Fraction(x).denominator)
