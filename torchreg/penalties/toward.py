"""Ω(w − w₀): any penalty, moved to have its minimum at an anchor."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from torchreg._distributed import ShardLayout, local_part
from torchreg._tensors import Step, widened
from torchreg.penalties.base import Penalty, inner
from torchreg.penalties.coefficients import L1L2


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Toward(Penalty):
    """Ω(w − w₀).

    prox(w, step) = w₀ + prox_Ω(w − w₀, step): where Ω's prox gives an exact zero, w is exactly w₀.

    Users write `Regularizer(..., toward=state_dict)`, which makes one for each parameter.

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

    name: ClassVar[str] = "toward"
    formula: ClassVar[str] = "Ω(w − w₀)"
    strengths: ClassVar[tuple[str, ...]] = ()

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

    def _rounded_to(self, dtype: torch.dtype) -> Toward:
        return self if self.anchor.dtype is dtype else dataclasses.replace(self, anchor=self.anchor.to(dtype))

    def _on(self, shard: ShardLayout) -> Toward:
        return dataclasses.replace(self, penalty=self.penalty._on(shard), anchor=shard.part(self.anchor))

    def _value(self, w: Tensor) -> Tensor:
        return self.penalty._value(w - self.anchor.to(w))

    def _prox(self, w: Tensor, step: Step) -> Tensor:
        anchor = self.anchor.to(w)
        away = w - anchor
        kept = self.penalty._prox(away, step)
        # Exact at both ends, where w₀ + kept would round: no step leaves w, and a zero is w₀.
        return torch.where(kept == 0, anchor, w - (away - kept))

    def _soft(self) -> L1L2 | None:
        soft = self.penalty._soft()
        return None if soft is None or soft.anchor is not None else soft._replace(anchor=self.anchor)

    def _subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        return self.penalty._subgradient(w - self.anchor.to(w), gradient)

    def _dual_norm(self, gradient: Tensor) -> Tensor:
        return self.penalty._dual_norm(gradient)

    def _conjugate(self, v: Tensor) -> Tensor:
        return self.penalty._conjugate(v) + inner(v, self.anchor.to(v))
