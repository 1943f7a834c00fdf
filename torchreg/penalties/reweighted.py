"""Reweighted: a concave penalty whose critical points are its own under every optimizer and step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreg._tensors import Step, checked_weights, local_part, widened
from torchreg.penalties.base import Penalty
from torchreg.penalties.concave import Concave
from torchreg.penalties.weighted_l1 import WeightedL1


@dataclass(frozen=True)
class Reweighted(Penalty):
    """Ω(w) = Σω(|w|), with the prox of its tangent.

    A training step from w₀ takes prox(w, step) = soft(w, step·ω′(|w₀|)), the prox of the tangent of ω at |w₀|. It is L1
    with a strength for each weight, renewed at each step. A weight rests where gradient + ω′(|w|)·sign(w) = 0, and a
    zero where |gradient| ≤ ω′(0). These are all the critical points of loss + Ω, whatever the step. The exact prox
    rests at some of them only, and which ones depends on the step. Under Adam, whose step grows as a gradient fades, it
    does not even keep the large weights, which Ω should leave alone.

    Without the w₀ of a training step, `prox(w, step)` takes the tangent at `w` itself.

    Args:
        penalty: Ω, with a finite slope at 0: MCP, SCAD, LogSum, TransformedL1 or CappedL1.
    Shape:
        w: any shape, floating or complex. The value is a 0-d tensor (float32 or wider); the prox keeps w's
        shape and dtype.
    Raises:
        TypeError: `penalty` is not a concave penalty of single weights.
        ValueError: its slope at 0 is infinite.
    Source: Zou and Li, 2008 (local linear approximation); Candès, Wakin and Boyd, 2008.

    >>> penalty = Reweighted(MCP(0.5, gamma=3.0))
    >>> start = torch.tensor([0.0, 0.75, 1.5])  # slopes 0.5, 0.25, 0
    >>> penalty.linearized(start).prox(torch.tensor([0.25, 1.0, 1.5]), step=1.0)
    tensor([0.0000, 0.7500, 1.5000])
    """

    penalty: Concave

    formula = "Ω(w) = Σω(|w|), with the prox of its tangent"
    convex = False
    separable = True
    linearizes = True

    def __post_init__(self) -> None:
        if not isinstance(self.penalty, Concave):
            raise TypeError(
                f"expected a concave penalty of single weights, such as MCP(1e-4) or LogSum(1e-4), got "
                f"{self.penalty!r}; use a convex penalty as it is: its prox already rests at its own solutions"
            )
        if self.penalty.with_strengths(strength=1.0).slope(torch.zeros((), device="cpu")).item() == math.inf:
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
        """The names of the wrapped penalty's strengths."""
        return self.penalty.strengths

    @property
    def strength(self) -> float:
        """λ of the wrapped penalty."""
        return self.penalty.strength

    def with_strengths(self, **strengths: float | Tensor) -> Reweighted:
        new = object.__new__(
            type(self)
        )  # unchecked: the slope is known to be finite, and a compiled step must not read
        object.__setattr__(new, "penalty", self.penalty.with_strengths(**strengths))
        return new

    def linearized(self, w: Tensor) -> WeightedL1:
        """The tangent of Ω at `w`, up to a constant: L1 with the strength ω′(|w|) for each weight."""
        modulus = widened(local_part(checked_weights(type(self).__name__, w))).abs()
        return WeightedL1(1.0, self.penalty.slope(modulus))

    def value(self, w: Tensor) -> Tensor:
        return self.penalty.value(w)

    def prox_map(self, w: Tensor, step: Step) -> Tensor:
        return self.linearized(w).prox_map(w, step)

    def nearest_subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        return self.penalty.nearest_subgradient(w, gradient)

    def dual_norm(self, gradient: Tensor) -> Tensor:
        return self.penalty.dual_norm(gradient)
