"""Ω(w − w₀): any penalty, moved to have its minimum at an anchor."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from torchreg._tensors import Layout, Step, local_part, widened
from torchreg.penalties.base import Penalty, inner
from torchreg.penalties.coefficients import L1L2


@dataclasses.dataclass(frozen=True, eq=False)
class Toward(Penalty):
    """Ω(w − w₀).

    prox(w, step) = w₀ + prox_Ω(w − w₀, step): where Ω's prox gives an exact zero, w is exactly w₀.

    Users write `Regularizer(..., toward=state_dict)`, which makes a Toward for each parameter.

    Args:
        penalty: Ω.
        anchor: w₀, of the weights' shape.
    Shape:
        w: the anchor's shape.
    Source: Li, Grandvalet and Davoine, 2018 (L2-SP).

    >>> from torchreg import L1
    >>> Toward(L1(0.5), torch.tensor([1.0, 1.0])).prox(torch.tensor([3.0, 1.25]), step=1.0)
    tensor([2.5000, 1.0000])
    """

    penalty: Penalty
    anchor: Tensor

    name = "toward"
    formula = "Ω(w − w₀)"
    strengths = ()

    @property
    def convex(self) -> bool:  # type: ignore[override]
        return self.penalty.convex

    @property
    def separable(self) -> bool:  # type: ignore[override]
        return self.penalty.separable

    @property
    def smooth(self) -> bool:  # type: ignore[override]
        return self.penalty.smooth

    @property
    def linearizes(self) -> bool:  # type: ignore[override]
        return self.penalty.linearizes

    @property
    def is_zero(self) -> bool:
        return self.penalty.is_zero

    def check(self, w: Tensor) -> None:
        self.penalty.check(w)

    def scaled(self, factor: float) -> Toward:
        return dataclasses.replace(self, penalty=self.penalty.scaled(factor))

    def linearized(self, w: Tensor) -> Toward:
        wide = widened(local_part(w))
        return dataclasses.replace(self, penalty=self.penalty.linearized(wide - local_part(self.anchor).to(wide)))

    def rounded_to(self, dtype: torch.dtype) -> Toward:
        return self if self.anchor.dtype is dtype else dataclasses.replace(self, anchor=self.anchor.to(dtype))

    def on_part(self, layout: Layout) -> Toward:
        return dataclasses.replace(self, penalty=self.penalty.on_part(layout), anchor=layout.part(self.anchor))

    def value(self, w: Tensor) -> Tensor:
        return self.penalty.value(w - self.anchor.to(w))

    def prox_map(self, w: Tensor, step: Step) -> Tensor:
        anchor = self.anchor.to(w)
        away = w - anchor
        new = self.penalty.prox_map(away, step)
        # Exact at both ends, where w₀ + new would round: a step of 0 gives w, and a zero gives w₀.
        return torch.where(new == 0, anchor, w - (away - new))

    def coefficients(self) -> L1L2 | None:
        found = self.penalty.coefficients()
        return None if found is None or found.anchor is not None else found._replace(anchor=self.anchor)

    def nearest_subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        return self.penalty.nearest_subgradient(w - self.anchor.to(w), gradient)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return self.penalty.dual_norm(gradient)

    def conjugate(self, v: Tensor) -> Tensor:
        return self.penalty.conjugate(v) + inner(v, self.anchor.to(v))
