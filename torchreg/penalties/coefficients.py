"""The coefficients of L1 and L2 in one: λ₁Σ|w − w₀| + λ₂Σ(w − w₀)² as plain numbers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class L1L2(NamedTuple):
    """λ₁Σ|w − w₀| + λ₂Σ(w − w₀)² as numbers, which a kernel of one pass takes; w₀ is 0 where there is no anchor."""

    l1: float
    l2: float
    anchor: Tensor | None = None
