"""The base of every penalty: what users call, and what a penalty of your own writes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from torchreg._checks import nonnegative
from torchreg._distributed import layout_of
from torchreg._tensors import Layout, Step, checked_step, checked_weights, widened
from torchreg.penalties.coefficients import L1L2

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclasses.dataclass(frozen=True)
class Penalty(ABC):
    """Ω(w): immutable, pure mathematics, with its value and its prox side by side.

    A penalty of your own is a frozen dataclass with the class attributes below and two formulas:

    - `value(w)`: Ω(w), a 0-d tensor that autograd can follow.
    - `prox_map(w, step)`: argmin_u ½‖u − w‖²_{1/step} + Ω(u), a new tensor.

    Both get tensors that are already checked and in float32 or wider. `testing.check_penalty` certifies the result. The
    other methods are optional, and each gives something more:

    - `nearest_subgradient(w, gradient)`: `stationarity`; with `dual_norm(gradient)` also `lambda_max`, and with
      `conjugate(v)` also `duality_gap` and the certificate of `FISTA`.
    - `coefficients()`: the native kernels, for a sum of |w| and w².
    - `on_part(layout)`: sharded weights, for a penalty that is not separable.
    - `check(w)`: refuses weights of a wrong shape when the regularizer is built.
    - `linearized(w)`, with `linearizes = True`: a step takes the prox of a tangent.
    - `rounded_to(dtype)`: low-precision weights, for a penalty whose minimum is not at 0.
    - `with_strengths(**strengths)`: strengths that are not fields of the penalty itself.

    Attributes:
        name: the key of a regularizer's term that has this penalty alone.
        formula: the formula, as the field writes it.
        convex: whether Ω is convex.
        separable: whether Ω is a sum over single weights.
        smooth: whether Ω is differentiable everywhere.
        strengths: the names of the fields that are strengths λ. They multiply Ω, or at least its slope at 0.
        linearizes: whether a training step from `w` takes the prox of `linearized(w)`.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    convex: ClassVar[bool]
    separable: ClassVar[bool]
    smooth: ClassVar[bool] = False
    strengths: ClassVar[tuple[str, ...]] = ("strength",)
    linearizes: ClassVar[bool] = False

    # ------------------------------------------------------------------ what users call

    def __call__(self, w: Tensor) -> Tensor:
        """Ω(w).

        Args:
            w: any shape, floating or complex.
        Returns:
            A 0-d real tensor that autograd can follow, in float32 or wider. For a sharded weight it is the value of the
            whole weight, on every process, and every process must make the call.
        Raises:
            TypeError: `w` is not a floating or complex tensor.
        """
        layout, penalty = self._at(w)
        return layout.peers.sum(penalty.value(widened(layout.part(w))))

    def prox(self, w: Tensor, step: Step) -> Tensor:
        """argmin_u ½‖u − w‖²_{1/step} + Ω(u), where ‖x‖²_{1/step} = Σ|x|²/step.

        Args:
            w: any shape, floating or complex.
            step: a finite number ≥ 0, or a real tensor of such numbers that broadcasts against `w`. A step of 0 gives
                `w` back.
        Returns:
            A new tensor of `w`'s shape and dtype, computed in float32 or wider and rounded once. For a sharded weight
            it is sharded in the same way, and has no graph.
        Raises:
            TypeError: `w` is not a floating or complex tensor, or `step` is not a real number or tensor.
            ValueError: `step` is negative, infinite or NaN, or does not broadcast. (This check reads a tensor step, and
                so synchronizes with its device; `prox_` does not.)
        """
        layout, penalty = self._at(w)
        step = checked_step(step, w.shape)
        with torch.no_grad() if layout.divided else nullcontext():
            part = layout.part(w)
            new = penalty.prox_map(widened(part), layout.step_of_part(step, part))
            return layout.whole(new.to(w.dtype))

    def prox_(self, w: Tensor, step: Step) -> Tensor:
        """`prox` in place, for a training step: a tensor `step` is not validated, so that nothing synchronizes."""
        layout, penalty = self._at(w)
        step = widened(step) if isinstance(step, Tensor) else checked_step(step, w.shape)
        with torch.no_grad() if layout.divided else nullcontext():
            part = layout.part(w)
            wide = widened(part)
            if torch.is_grad_enabled():
                wide = wide.clone()  # a differentiable step keeps the old weights for its backward
            part.copy_(penalty.prox_map(wide, layout.step_of_part(step, part)))
        return w

    def subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        """argmin_{v ∈ ∂Ω(w)} ‖gradient + v‖: the subgradient of Ω at `w` that is nearest to −gradient.

        So gradient + subgradient is the smallest subgradient of loss + Ω, and it is 0 exactly where `w` is stationary.
        If Ω is not convex, its subgradients are the limiting ones: the limits of slopes nearby, and all values between
        them at a kink.

        Args:
            w: any shape, floating or complex.
            gradient: the gradient of the data loss at `w`, in `w`'s shape. A complex one is autograd's: the direction
                of ascent.
        Returns:
            A new tensor of `w`'s shape and dtype.
        Raises:
            TypeError: `w` or `gradient` is not a floating or complex tensor, or only one of them is complex.
            ValueError: their shapes differ.
            NotImplementedError: this penalty has no `nearest_subgradient`.

        >>> from torchreg import L1
        >>> L1(0.5).subgradient(torch.tensor([2.0, 0.0, 0.0]), torch.tensor([-0.1, 0.25, 3.0]))
        tensor([ 0.5000, -0.2500, -0.5000])
        """
        layout, penalty = self._at(w)
        checked_weights(type(self).__name__, gradient)
        if gradient.shape != w.shape:
            raise ValueError(
                f"gradient has shape {tuple(gradient.shape)} and the weights {tuple(w.shape)}; pass the data loss's "
                "gradient, as w.grad has it"
            )
        if gradient.is_complex() != w.is_complex():
            raise TypeError(
                f"gradient has dtype {gradient.dtype} and the weights {w.dtype}; pass the data loss's gradient, "
                "as w.grad has it"
            )
        part, gradient = widened(layout.part(w)), layout.part(widened(gradient))
        return layout.whole(penalty.nearest_subgradient(part, gradient).to(w.dtype))

    def scaled(self, factor: float) -> Self:
        """The same penalty with every strength multiplied by `factor`.

        >>> from torchreg import L1
        >>> L1(0.5).scaled(0.1)
        L1(strength=0.05)
        """
        return self.with_strengths(**{name: getattr(self, name) * factor for name in self.strengths})

    @property
    def is_zero(self) -> bool:
        """Whether every strength is 0: then Ω is zero and its prox the identity."""
        return all(getattr(self, name) == 0 for name in self.strengths)

    # ------------------------------------------------------------------ what a penalty writes

    @abstractmethod
    def value(self, w: Tensor) -> Tensor:
        """Ω(w), 0-d, for checked weights in float32 or wider."""

    @abstractmethod
    def prox_map(self, w: Tensor, step: Step) -> Tensor:
        """The prox as a new tensor, for checked weights in float32 or wider. A tensor `step` is not validated."""

    # ------------------------------------------------------------------ what it may write

    def nearest_subgradient(self, w: Tensor, gradient: Tensor) -> Tensor:
        """The element of ∂Ω(w) nearest to −gradient, in `w`'s shape."""
        raise self._lacks("nearest_subgradient(self, w, gradient)", "the element of ∂Ω(w) nearest to −gradient")

    def dual_norm(self, gradient: Tensor) -> Tensor:
        """The smallest c ≥ 0 with −gradient ∈ c·∂Ω at Ω's minimum, and inf if there is none; 0-d."""
        raise self._lacks("dual_norm(self, gradient)", "the smallest c ≥ 0 with −gradient ∈ c·∂Ω(0), or inf")

    def conjugate(self, v: Tensor) -> Tensor:
        """Ω*(v) = sup_w ⟨v, w⟩ − Ω(w), and inf outside its domain; 0-d."""
        raise self._lacks("conjugate(self, v)", "Ω*(v) = sup_w ⟨v, w⟩ − Ω(w), or inf")

    def coefficients(self) -> L1L2 | None:
        """The coefficients of |w| and w² if Ω is a sum of these: a kernel then computes it. Else None."""
        return None

    def on_part(self, layout: Layout) -> Penalty:
        """The penalty of this process's part of a sharded weight: all parts' values sum to Ω, their proxes make up Ω's.

        A separable penalty is the same on every part.
        """
        if self.separable:
            return self
        raise NotImplementedError(
            f"{type(self).__name__} is not a sum over single weights, and the weight is sharded; give it the method "
            "on_part(self, layout) that returns the penalty of a process's part, or keep the weight out of the sharding"
        )

    def check(self, w: Tensor) -> None:  # noqa: B027  most penalties take any shape
        """Raises a ValueError if Ω is not defined for weights of `w`'s shape. A regularizer asks when it is built."""

    def linearized(self, w: Tensor) -> Penalty:
        """The penalty whose prox a training step from `w` takes: this one, unless it `linearizes`.

        For a sharded `w` it is the penalty of this process's part.
        """
        return self

    def rounded_to(self, dtype: torch.dtype) -> Self:
        """The same penalty with its minimum at numbers that weights of this dtype can have."""
        return self

    def with_strengths(self, **strengths: float | Tensor) -> Self:
        """The same penalty with other strengths.

        Args:
            strengths: numbers, checked as at construction; or 0-d tensors, which are not validated. With tensors it has
                a value and a prox alone, and a compiled graph takes them as inputs.
        Raises:
            TypeError, ValueError: as at construction, or a name is not in `strengths`.

        >>> from torchreg import ElasticNet
        >>> ElasticNet(l1=0.5, l2=0.25).with_strengths(l2=0.0)
        ElasticNet(l1=0.5, l2=0.0)
        """
        if unknown := [name for name in strengths if name not in self.strengths]:
            raise TypeError(
                f"{type(self).__name__} has no strength {unknown[0]!r}; it has {', '.join(self.strengths) or 'none'}"
            )
        if not any(isinstance(value, Tensor) for value in strengths.values()):
            return dataclasses.replace(self, **strengths)
        new = object.__new__(type(self))
        for field in dataclasses.fields(self):
            # The old number of a strength is not read: a compiled graph would hold for that number alone.
            value = strengths[field.name] if field.name in strengths else getattr(self, field.name)
            object.__setattr__(new, field.name, value)
        return new

    # ------------------------------------------------------------------ how it is built

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {"value", "__call__", "prox_map", "prox", "prox_"} & vars(cls).keys()
        if own and "coefficients" not in vars(cls):
            # The coefficients that it inherits belong to another value or prox.
            cls.coefficients = Penalty.coefficients  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        kind = type(self).__name__
        required = ("name", "formula", "convex", "separable")
        if missing := [attribute for attribute in required if not hasattr(type(self), attribute)]:
            raise TypeError(f"{kind} does not declare {', '.join(missing)}; write them as class attributes, as L1 does")
        fields = {field.name for field in dataclasses.fields(self)}
        if not (isinstance(self.strengths, tuple) and fields.issuperset(self.strengths)):
            raise TypeError(
                f"{kind}.strengths is {self.strengths!r}, but must be a tuple of names of its fields "
                f"({', '.join(sorted(fields)) or 'none'}); name those that multiply the penalty"
            )
        for name in self.strengths:
            value = nonnegative(name, getattr(self, name), f"write {kind}({name}=1e-4)")
            object.__setattr__(self, name, value)

    def _at(self, w: Tensor) -> tuple[Layout, Penalty]:
        """How `w` lies over processes, and the penalty of this process's part of it."""
        layout = layout_of(checked_weights(type(self).__name__, w))
        return layout, self.on_part(layout) if layout.divided else self

    def _lacks(self, method: str, formula: str) -> NotImplementedError:
        return NotImplementedError(
            f"{type(self).__name__} cannot certify a solution yet; give it the method {method} that returns {formula}"
        )


# ---------------------------------------------------------------------- formulas that penalties share


def sum_of_squares(w: Tensor) -> Tensor:
    """Σ|w|², smooth at 0 for complex weights too, where |w| is not."""
    return (w * w.conj()).real.sum() if w.is_complex() else w.square().sum()


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Re Σ conj(a)·b: the inner product in which autograd's complex gradients are gradients; 0-d."""
    return (a.conj() * b).real.sum() if a.is_complex() else (a * b).sum()


def largest(w: Tensor) -> Tensor:
    """max|w|, and 0 if there are no entries."""
    return w.abs().amax() if w.numel() else w.abs().sum()


def modulus_subgradient(w: Tensor, gradient: Tensor, limit: Step) -> Tensor:
    """The subgradient of limit·|w| nearest to −gradient: limit·sign(w), and at w = 0 −gradient, cut off at ±limit."""
    at_zero = -gradient.sgn() * gradient.abs().clamp(max=limit)
    return torch.where(w == 0, at_zero, limit * (w / w.abs()))  # the sign of a NaN would be 0


def over(value: Tensor, strength: Step) -> Tensor:
    """value/strength for a `value` ≥ 0, with 0/0 = 0."""
    return torch.where(value == 0, 0.0, value / strength)


def divided(w: Tensor, by: Step) -> Tensor:
    """w/by. Torch 2.6 divides complex numbers by way of squares: inexact by 1, and NaN by a huge step."""
    return w * (1 / by) if w.is_complex() else w / by


def indicator(inside: Tensor) -> Tensor:
    """0 if all of `inside` is true, else inf; 0-d."""
    return torch.where(inside.all(), 0.0, torch.inf)
