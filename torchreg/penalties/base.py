"""What a penalty is: a value and a prox, and nothing that knows of names or models."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from torchreg._checks import nonnegative
from torchreg._distributed import ShardLayout, local_part, shard_layout
from torchreg._tensors import Step, checked_step, checked_weights, widened
from torchreg.penalties.coefficients import L1L2 as L1L2

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclasses.dataclass(frozen=True, repr=False)
class Penalty(ABC):
    """Ω(w): pure, immutable maths, with its value and its prox side by side.

    A subclass is a frozen dataclass whose fields named in `strengths` multiply it, or its slope at 0 at least. It
    writes two formulas, `_value(w)` and `_prox(w, step)`, on weights that are already checked and in float32 or wider.
    Three more let `stationarity`, `lambda_max` and `duality_gap` certify a solution: `_subgradient(w, gradient)`,
    `_dual_norm(gradient)` and `_conjugate(v)`; without them everything else works.

    Attributes:
        name: the key of a regularizer's term that has this penalty alone.
        formula: as it stands in the field, shown by `repr`.
        strengths: names of the fields that are strengths (λ).
        convex: Ω is convex.
        separable: Ω is a sum over single weights.
        smooth: Ω is differentiable everywhere.
        linearizes: a training step takes the prox of `linearized(w)`, with `w` the weights that the step starts from.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    strengths: ClassVar[tuple[str, ...]]
    convex: ClassVar[bool]
    separable: ClassVar[bool]
    smooth: ClassVar[bool]
    linearizes: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {"_value", "__call__", "_prox", "prox", "prox_"} & vars(cls).keys()
        if own and "_soft" not in vars(cls):
            cls._soft = Penalty._soft  # type: ignore[method-assign]  # what it inherits is of another value or prox

    def __post_init__(self) -> None:
        kind = type(self).__name__
        said = ("name", "formula", "strengths", "convex", "separable", "smooth")
        if missing := [attribute for attribute in said if not hasattr(type(self), attribute)]:
            raise TypeError(f"{kind} does not say {', '.join(missing)}; write them as class attributes, as L1 does")
        fields = {field.name for field in dataclasses.fields(self)}
        if not (isinstance(self.strengths, tuple) and fields.issuperset(self.strengths)):
            raise TypeError(
                f"{kind}.strengths is {self.strengths!r}, which is no tuple of names of its fields "
                f"({', '.join(sorted(fields)) or 'none'}); name those that multiply the penalty"
            )
        for name in self.strengths:
            value = nonnegative(name, getattr(self, name), f"write {kind}({name}=1e-4)")
            object.__setattr__(self, name, value)

    def __call__(self, w: Tensor) -> Tensor:
        """Ω(w).

        Args:
            w: any shape, floating or complex.
        Returns:
            A 0-d real tensor that autograd can follow, in float32 or wider.
            Of a sharded weight it is the value of the whole, on every process: all of them call this.
        Raises:
            TypeError: `w` is no tensor, or of an integer type.
        """
        shard = shard_layout(checked_weights(type(self).__name__, w))
        if shard is None:
            return self._value(widened(w))
        return shard.peers.sum(self._on(shard)._value(widened(local_part(w))))

    def prox(self, w: Tensor, step: Step) -> Tensor:
        """argmin_u ½‖u − w‖²_{1/step} + Ω(u), where ‖x‖²_{1/step} = Σ|x|²/step.

        Args:
            w: any shape, floating or complex.
            step: a finite number ≥ 0, or a real tensor of such that broadcasts against `w`; 0 gives `w` back.
        Returns:
            A new tensor of `w`'s shape and dtype. The computation is in float32 or wider, then rounded once. That of a
            sharded weight is sharded as it is, and has no graph.
        Raises:
            TypeError: `w` is no floating or complex tensor, or `step` is no real number or tensor.
            ValueError: `step` is negative, infinite or NaN, or does not broadcast. (Looking at a tensor step
                synchronizes with its device; `prox_` does not look.)
        """
        shard = shard_layout(checked_weights(type(self).__name__, w))
        step = checked_step(step, w.shape)
        if shard is None:
            return self._prox(widened(w), step).to(w.dtype)
        with torch.no_grad():
            return shard.whole(self._local_prox(shard, local_part(w), step).to(w.dtype))

    def prox_(self, w: Tensor, step: Step) -> Tensor:
        """`prox` in place, for a training step: a tensor `step` is not looked at, so nothing synchronizes."""
        shard = shard_layout(checked_weights(type(self).__name__, w))
        step = widened(step) if isinstance(step, Tensor) else checked_step(step, w.shape)
        if shard is not None:
            with torch.no_grad():
                part = local_part(w)
                part.copy_(self._local_prox(shard, part, step))
            return w
        wide = widened(w)
        if torch.is_grad_enabled():
            wide = wide.clone()  # a differentiable step keeps the old weights for its backward
        return w.copy_(self._prox(wide, step))

    def subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        """argmin_{v ∈ ∂Ω(w)} ‖gradient + v‖, the subgradient of Ω at `w` nearest to −gradient.

        So gradient + subgradient is the least subgradient of loss + Ω, and 0 exactly where `w` is stationary. Of an Ω
        that is not convex they are the limiting ones: the limits of slopes nearby, and what lies between at a kink.

        Args:
            w: any shape, floating or complex.
            gradient: of the data loss at `w`, of `w`'s shape; complex as autograd has it, the direction of ascent.
        Returns:
            A new tensor of `w`'s shape and dtype.
        Raises:
            TypeError: `w` or `gradient` is no floating or complex tensor, or one is complex and the other real.
            ValueError: their shapes differ.
            NotImplementedError: this penalty does not say what its subgradients are.

        >>> from torchreg import L1
        >>> L1(0.5).subgradient(torch.tensor([2.0, 0.0, 0.0]), torch.tensor([-0.1, 0.25, 3.0]))
        tensor([ 0.5000, -0.2500, -0.5000])
        """
        name = type(self).__name__
        wide, gradient = widened(checked_weights(name, w)), widened(checked_weights(name, gradient))
        if gradient.shape != w.shape:
            raise ValueError(
                f"gradient of shape {tuple(gradient.shape)} is not that of weights of shape {tuple(w.shape)}; "
                "pass the data loss's gradient, as w.grad has it"
            )
        if gradient.is_complex() != w.is_complex():
            raise TypeError(
                f"gradient has dtype {gradient.dtype} and the weights {w.dtype}; pass the data loss's gradient, "
                "as w.grad has it"
            )
        shard = shard_layout(w)
        if shard is None:
            return self._subgradient(wide, gradient).to(w.dtype)
        return shard.whole(self._on(shard)._subgradient(local_part(wide), shard.part(gradient)).to(w.dtype))

    def linearized(self, w: Tensor) -> Penalty:
        """The penalty whose prox follows a step that starts at `w`: this one, unless it `linearizes`.

        Of a sharded `w` it is that of this process's part.
        """
        return self

    def check(self, w: Tensor) -> None:  # noqa: B027  most penalties take any shape
        """Raises a ValueError where Ω has no meaning for weights of `w`'s shape: asked when a regularizer is built."""

    def scaled(self, factor: float) -> Self:
        """The same penalty with every strength multiplied by `factor`.

        >>> from torchreg import L1
        >>> L1(0.5).scaled(0.1)
        L1(strength=0.05)  # λΣ|w|
        """
        return self._with(**{name: getattr(self, name) * factor for name in self.strengths})

    @property
    def is_zero(self) -> bool:
        """Every strength is 0: Ω is zero, and its prox the identity."""
        return all(getattr(self, name) == 0 for name in self.strengths)

    def __repr__(self) -> str:
        fields = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in dataclasses.fields(self))
        return f"{type(self).__name__}({fields})  # {self.formula}"

    @abstractmethod
    def _value(self, w: Tensor) -> Tensor:
        """Ω(w) for checked weights in float32 or wider."""

    @abstractmethod
    def _prox(self, w: Tensor, step: Step) -> Tensor:
        """The prox for checked weights in float32 or wider; a tensor step is taken on trust."""

    def _on(self, shard: ShardLayout) -> Penalty:
        """The penalty of this process's part of a weight: the parts' values sum to Ω, and their proxes make up Ω's."""
        if self.separable:
            return self
        raise NotImplementedError(
            f"{type(self).__name__} is no sum over single weights, and the weight is sharded; give it the method "
            "_on(self, shard) that returns the penalty of a process's part, or keep the weight out of the sharding"
        )

    def _local_prox(self, shard: ShardLayout, w: Tensor, step: Step) -> Tensor:
        """The prox of this process's part of a weight, in float32 or wider."""
        if isinstance(step, Tensor) and step.shape != w.shape:
            step = shard.part(step)
        return self._on(shard)._prox(widened(w), local_part(step) if isinstance(step, Tensor) else step)

    def _with(self, **strengths: float) -> Self:
        """The same penalty with other strengths."""
        return dataclasses.replace(self, **strengths)

    def _soft(self) -> L1L2 | None:
        """Ω as numbers, if it is a sum of |w| and w²; else None: value and prox are passes of their own."""
        return None

    def _rounded_to(self, dtype: torch.dtype) -> Self:
        """The same penalty with its minimum at numbers that weights of this dtype can be."""
        return self

    def _under(self, strengths: Sequence[Tensor]) -> Self:
        """The same penalty with 0-d tensors for its strengths, so that a compiled graph takes them as inputs.

        It has a value and a prox alone, and strengths are trusted.
        """
        new = object.__new__(type(self))
        given = dict(zip(self.strengths, strengths, strict=True))
        for field in dataclasses.fields(self):
            # A strength's number is not read: a compiled graph would be one of that number.
            value = given[field.name] if field.name in given else getattr(self, field.name)
            object.__setattr__(new, field.name, value)
        return new

    def _subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        """The element of ∂Ω(w) nearest to −gradient, in `w`'s shape."""
        raise self._lacks("_subgradient(self, w, gradient)", "the element of ∂Ω(w) nearest to −gradient")

    def _dual_norm(self, gradient: Tensor) -> Tensor:
        """The smallest c ≥ 0 with −gradient ∈ c·∂Ω at Ω's minimum, inf if there is none; 0-d."""
        raise self._lacks("_dual_norm(self, gradient)", "the smallest c ≥ 0 with −gradient ∈ c·∂Ω(0), or inf")

    def _conjugate(self, v: Tensor) -> Tensor:
        """Ω*(v) = sup_w ⟨v, w⟩ − Ω(w), inf outside its domain; 0-d."""
        raise self._lacks("_conjugate(self, v)", "Ω*(v) = sup_w ⟨v, w⟩ − Ω(w), or inf")

    def _lacks(self, method: str, formula: str) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__} cannot certify a solution yet; give it the method {method} that returns {formula}"
        )


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Re Σ conj(a)·b: the inner product in which autograd's complex gradients are gradients. 0-d."""
    return (a.conj() * b).real.sum() if a.is_complex() else (a * b).sum()


def largest(w: Tensor) -> Tensor:
    """max|w|, and 0 of nothing."""
    return w.abs().amax() if w.numel() else w.abs().sum()


def over(value: Tensor, strength: Step) -> Tensor:
    """value/strength for a `value` ≥ 0, with 0/0 = 0."""
    return torch.where(value == 0, 0.0, value / strength)


def divided(w: Tensor, by: Step) -> Tensor:
    """w/by. Torch 2.6 divides complex numbers by way of squares: inexact by 1, and NaN by a huge step."""
    return w * (1 / by) if w.is_complex() else w / by


def indicator(inside: Tensor) -> Tensor:
    """0 where all of `inside` is true, else inf; 0-d."""
    return torch.where(inside.all(), 0.0, torch.inf)
