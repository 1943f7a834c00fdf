"""The coefficients of L1 and L2: what a kernel needs to know of a penalty λ₁Σ|w − w₀| + λ₂Σ(w − w₀)²."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class L1L2(NamedTuple):
    """λ₁Σ|w − w₀| + λ₂Σ(w − w₀)² as plain numbers and the tensor w₀, which is 0 if `anchor` is None."""

    l1: float
    l2: float
    anchor: Tensor | None = None
