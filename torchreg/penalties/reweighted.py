"""Reweighted: a concave penalty whose critical points are its own under every optimizer and step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchreg._distributed import local_part
from torchreg._tensors import Step, checked_weights, widened
from torchreg.penalties.base import Penalty
from torchreg.penalties.concave import Concave
from torchreg.penalties.weighted_l1 import WeightedL1


@dataclass(frozen=True, repr=False)
class Reweighted(Penalty):
    """Ω(w) = Σω(|w|), with the prox of its tangent.

    A training step from w₀ takes prox(w, step) = soft(w, step·ω′(|w₀|)), with the tangent of ω at |w₀| in its place: L1
    with a strength for each weight, renewed at each step. A weight rests where gradient + ω′(|w|)·sign(w) = 0, and a
    zero where |gradient| ≤ ω′(0): at the critical points of loss + Ω, at all of them, whatever the step. The exact prox
    does not stay at all of them, and at which depends on the step; under Adam, whose step grows as a gradient fades, it
    leaves the large weights that Ω is to let alone.

    Without the w₀ of a step, `prox(w, step)` takes the tangent at `w` itself.

    Args:
        penalty: Ω, with a finite slope at 0: MCP, SCAD, LogSum, TransformedL1 or CappedL1.
    Shape:
        w: any shape, floating or complex. The value is a 0-d tensor (float32 or wider); the prox keeps w's
        shape and dtype.
    Raises:
        TypeError: `penalty` is no concave penalty of single weights.
        ValueError: its slope at 0 is infinite.
    Source: Zou and Li, 2008 (local linear approximation); Candès, Wakin and Boyd, 2008.

    >>> penalty = Reweighted(MCP(0.5, gamma=3.0))
    >>> start = torch.tensor([0.0, 0.75, 1.5])  # slopes 0.5, 0.25, 0
    >>> penalty.linearized(start).prox(torch.tensor([0.25, 1.0, 1.5]), step=1.0)
    tensor([0.0000, 0.7500, 1.5000])
    """

    penalty: Concave

    formula: ClassVar[str] = "Ω(w) = Σω(|w|), with the prox of its tangent"
    convex: ClassVar[bool] = False
    separable: ClassVar[bool] = True
    smooth: ClassVar[bool] = False
    linearizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.penalty, Concave):
            raise TypeError(
                f"penalty={self.penalty!r} is no concave penalty of single weights; give Reweighted one such as "
                "MCP(1e-4) or LogSum(1e-4). The prox of a convex one rests at its own solutions as it is"
            )
        if self.penalty._with(strength=1.0)._slope(torch.zeros((), device="cpu")).item() == math.inf:
            raise ValueError(
                f"penalty={self.penalty!r} has an infinite slope at 0, so that its tangent would hold every zero for "
                "ever; use LogSum or TransformedL1 with a small epsilon or a, which come near to it"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        """The key of a regularizer's term: `reweighted_mcp`."""
        return f"reweighted_{self.penalty.name}"

    @property
    def strengths(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of the penalty."""
        return self.penalty.strengths

    @property
    def strength(self) -> float:
        """λ of the penalty."""
        return self.penalty.strength

    def linearized(self, w: Tensor) -> WeightedL1:
        """The tangent of Ω at `w`, less a constant: L1 with the strength ω′(|w|) for each weight."""
        modulus = widened(local_part(checked_weights(type(self).__name__, w))).abs()
        return WeightedL1(1.0, self.penalty._slope(modulus))

    def __repr__(self) -> str:
        return f"Reweighted({repr(self.penalty).partition('  #')[0]})  # {self.formula}"

    def _with(self, **strengths: float) -> Reweighted:
        return self._of(self.penalty._with(**strengths))

    def _under(self, strengths: Sequence[Tensor]) -> Reweighted:
        return self._of(self.penalty._under(strengths))

    def _of(self, penalty: Concave) -> Reweighted:
        """The same of a penalty of this class, whose slope is known to be finite: a compiled step must not look."""
        new = object.__new__(type(self))
        object.__setattr__(new, "penalty", penalty)
        return new

    def _value(self, w: Tensor) -> Tensor:
        return self.penalty._value(w)

    def _prox(self, w: Tensor, step: Step) -> Tensor:
        return self.linearized(w)._prox(w, step)

    def _subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        return self.penalty._subgradient(w, gradient)

    def _dual_norm(self, gradient: Tensor) -> Tensor:
        return self.penalty._dual_norm(gradient)
