"""FISTA: convex problems to the solution, on all the data, with a line search and a certificate to stop on."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from torchreg._checks import nonnegative
from torchreg._distributed import is_sharded
from torchreg.binding.regularizer import Regularizer
from torchreg.inspection.certificates import distances, gathered, read_gradients, total_inner
from torchreg.optim.proximal import Proximal
from torchreg.optim.step_sizes import Group, State, StepSize
from torchreg.penalties import Penalty


@dataclass
class Point:
    """Weights, with the loss and its gradients there."""

    weights: list[Tensor]
    loss: Any  # as the closure returned it
    value: float
    gradients: list[Tensor]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.value) and math.isfinite(_norm(self.gradients))


class LineSearchStep(StepSize):
    """The step that the line search found last, or its first trial."""

    def __call__(self, group: Group, state: State, parameter: Tensor) -> float:
        return last_step(group)


def last_step(group: Group) -> float:
    """The step that the line search found last, or its first trial."""
    return float(group["step_size"] or group["lr"])


class FISTA(Proximal):
    """Accelerated proximal gradient for min f(w) + Ω(w): w⁺ = prox(y − s∇f(y), s), y = w⁺ + β(w⁺ − w).

    For convex losses over all the data: lasso, logistic regression and their kin, to full precision and with exact
    zeros. A line search finds the step s, for which f(w⁺) ≤ f(y) + ⟨∇f(y), w⁺ − y⟩ + ‖w⁺ − y‖²/(2s); the momentum β
    starts anew where it points uphill. A step evaluates the closure twice, and once more for each s that is refused.

    It stops on a certificate: once `stationarity` ≤ `tol`, a step leaves the weights as they are, until a strength or
    the loss changes. So a path of strengths starts each solution from the last.

    Args:
        params: the parameters to move, in one group. Those without a penalty take the gradient step alone.
        lr: the first trial of s. Any size serves, at the price of a few evaluations.
        tol: the relative distance of −∇f to ∂Ω at which to stop; None is √ε of the weights' dtype, 1.5e-8 in
            float64 and 3.5e-4 in float32. What can be reached is about 1e-11 and 1e-4.
        regularizer: whose penalties to apply; `params` must hold all that it selects.
        partial: allow that `params` lacks some selected parameters; another optimizer may carry those.
    Attributes:
        stationarity: ‖∇f + v‖ / max(‖∇f‖, ‖v‖) at the weights, with v the nearest subgradient of Ω, over all of
            `params`; inf before the first step. See `torchreg.stationarity`.
        converged: `stationarity` ≤ `tol`.
    Raises:
        ValueError: a penalty is not convex, `params` lacks a selected parameter, there are several
            groups, or `lr` is not positive.
        NotImplementedError: a penalty does not say what its subgradients are.
    Source: Beck and Teboulle, 2009; O'Donoghue and Candès, 2015, for the restart.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> reg = Regularizer(model, L1(0.5))
    >>> x, y = torch.eye(3), torch.tensor([[3.0], [0.6], [-0.3]])
    >>> optimizer = FISTA(model.parameters(), tol=1e-5, regularizer=reg)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = nn.functional.mse_loss(model(x), y)
    ...     loss.backward()
    ...     return loss
    >>> for step in range(100):
    ...     loss = optimizer.step(closure)
    ...     if optimizer.converged:
    ...         break
    >>> model.weight.detach()
    tensor([[2.2500, 0.0000, 0.0000]])
    """

    _step_size: ClassVar[StepSize] = LineSearchStep()
    not_attachable: ClassVar[str] = (
        "takes its prox inside its line search, where a prox after the step would undo it; give it the regularizer at "
        "construction: FISTA(params, regularizer=reg)"
    )

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        tol: float | None = None,
        *,
        regularizer: Regularizer,
        partial: bool = False,
    ) -> None:
        # What the steps carry on stands in the group too, so that every copy and checkpoint has it.
        defaults = {"lr": lr, "tol": tol, "step_size": None, "t": 1.0, "stationarity": math.inf}
        super().__init__(params, defaults, regularizer=regularizer, partial=partial)

    def _check(self, regularizer: Regularizer) -> None:
        held = {id(w) for group in self.param_groups for w in group["params"]}
        bindings = regularizer.resolution.current() if isinstance(regularizer, Regularizer) else []
        for binding in bindings:
            w = binding.parameter()
            if id(w) not in held:
                continue
            if is_sharded(w):
                raise ValueError(
                    f"{binding.name} is sharded, and the line search needs the whole loss and all gradients in one "
                    "process; use ProxSGD or ProxAdam"
                )
            if not binding.penalty.convex:
                raise ValueError(
                    f"{binding.name} has the penalty {binding.penalty!r}, which is not convex: momentum and the line "
                    "search need that it is; use ProxSGD or ProxAdam"
                )
            if not is_lazy(w):
                binding.penalty.subgradient(w, torch.zeros_like(w))

    @property
    def stationarity(self) -> float:
        """The relative distance of −∇f to ∂Ω at the weights, as the last step found it."""
        return float(self.param_groups[0]["stationarity"])

    @property
    def converged(self) -> bool:
        """The last step found `stationarity` ≤ `tol`."""
        (group,) = self.param_groups
        precision = max(torch.finfo(w.dtype).eps for w in group["params"])
        return self.stationarity <= (math.sqrt(precision) if group["tol"] is None else group["tol"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds the one group that there can be: the line search has one step for all."""
        if self.param_groups:
            raise ValueError("FISTA has one step for all parameters, so it takes one group; join them: [*a, *b]")
        group = {**self.defaults, **param_group}
        lr = nonnegative("lr", group["lr"], "it is the first trial of the line search, such as 1.0")
        if lr == 0:
            raise ValueError("lr=0 never moves; it is the first trial of the line search, such as 1.0")
        if group["tol"] is not None:
            nonnegative("tol", group["tol"], "it is the relative distance at which to stop, such as 1e-8")
        super().add_param_group({**group, "lr": lr})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint of another optimizer: the line search starts anew
            for key in ("tol", "step_size", "t", "stationarity"):
                group.setdefault(key, self.defaults[key])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One accelerated step, or none where the weights are stationary already.

        Args:
            closure: computes the data loss on all the data, calls `backward()` and returns the loss. It is called
                several times, with the regularizer disabled, so that `reg()` in it counts as 0. Gradients are zeroed
                before each call. A parameter that the loss does not use has the gradient 0.
        Returns:
            What `closure` returned at the weights that the step leaves; `.grad` is the gradient there.
        Raises:
            TypeError: there is no closure, or it returns no number.
            RuntimeError: the closure calls no `backward()`, or the loss is not finite at the weights. They are put back
                then, as after any error.
        """
        if not callable(closure):
            raise TypeError(
                "FISTA evaluates the loss several times a step, so it needs a closure: optimizer.step(closure), where "
                "closure() computes the loss, calls backward() and returns the loss"
            )
        if self.attachment is not None:
            self.attachment.check_carries()
            self.attachment.in_step = True
        params = [w for w in self.param_groups[0]["params"] if w.requires_grad]
        start = [w.clone() for w in params]
        try:
            return self._step(closure, params, start)
        except BaseException:
            _write(params, start)
            raise
        finally:
            if self.attachment is not None:
                self.attachment.stepped, self.attachment.in_step = True, False

    def _step(self, closure: Callable[[], Any], params: list[Tensor], start: list[Tensor]) -> Any:
        group = self.param_groups[0]
        carried = {} if self.attachment is None else self.attachment.penalties()
        penalties = [carried.get(id(w)) for w in params]
        longer = (1 + math.sqrt(1 + 4 * group["t"] ** 2)) / 2
        momentum = (group["t"] - 1) / longer
        if momentum:
            moves = [self.state[w].get("move", 0.0) for w in params]
            _write(params, [x + momentum * move for x, move in zip(start, moves, strict=True)])
        here = self._evaluate(closure, params)
        if momentum and not here.finite:  # it has carried the weights out of the loss's domain
            self._start_anew(params)
            _write(params, start)
            return self._step(closure, params, start)
        if not here.finite:
            raise RuntimeError(
                f"the loss is {here.value:g} and its gradient's norm {_norm(here.gradients):g}, and a step needs both "
                "finite; start from other weights, or look for a NaN in the data"
            )
        if not momentum:
            group["stationarity"] = _certificate(penalties, here)
            if self.converged:
                self._start_anew(params)
                return here.loss
        there, step, curvature = self._search(closure, params, penalties, here)
        uphill = total_inner(_difference(here.weights, there.weights), _difference(there.weights, start)) > 0
        short = not momentum and step * curvature < 0.5  # only without momentum may the step grow
        longest = 0.9 / curvature if curvature else math.inf
        group["step_size"] = min(10 * step, longest, _ceiling(params)) if short else step
        group["stationarity"] = _certificate(penalties, there)
        if uphill or short or self.converged:
            self._start_anew(params)
        else:
            group["t"] = longer
            for w, x in zip(params, start, strict=True):
                self.state[w]["move"] = w - x
        return there.loss

    def _search(
        self, closure: Callable[[], Any], params: list[Tensor], penalties: Sequence[Penalty | None], here: Point
    ) -> tuple[Point, float, float]:
        """The line search from `here`: where it leads, with the step that does and the curvature on the way."""
        step = last_step(self.param_groups[0])
        while step:
            _write(params, [_moved(*part, step) for part in zip(penalties, here.weights, here.gradients, strict=True)])
            there = self._evaluate(closure, params)
            curvature = _curvature(here, there, step)
            if step * curvature <= 1:
                return there, step, curvature
            step = step * 1e-3 if math.isinf(curvature) else min(step / 2, 0.9 / curvature)
        raise RuntimeError(
            "no step is short enough for a finite loss, though it is finite where the step starts; make the closure "
            "deterministic: the same batch each time, and no dropout"
        )

    def _start_anew(self, params: Sequence[Tensor]) -> None:
        """Forgets the momentum."""
        self.param_groups[0]["t"] = 1.0
        for w in params:
            self.state.pop(w, None)

    def _evaluate(self, closure: Callable[[], Any], params: Sequence[Tensor]) -> Point:
        off = contextlib.nullcontext() if self.regularizer is None else self.regularizer.disabled()
        self.zero_grad()
        with torch.enable_grad(), off:
            loss = closure()
        value = loss.item() if isinstance(loss, Tensor) and loss.numel() == 1 else loss
        if not isinstance(value, Real):
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"the closure returned {what}; it must return the loss, a single number")
        if params and all(w.grad is None for w in params):
            raise RuntimeError(
                "the closure left no gradient in the optimizer's parameters; call loss.backward() in it, and compute "
                "the loss from the model that they belong to"
            )
        # Copies: the closure may write the next point's gradient into the same memory, as bucket views do.
        gradients = [gradient.clone() for gradient in read_gradients(params)]
        return Point([w.clone() for w in params], loss, float(value), gradients)


def _moved(penalty: Penalty | None, w: Tensor, gradient: Tensor, step: float) -> Tensor:
    """prox(w − step·gradient, step)."""
    new = w - step * gradient
    return new if penalty is None else penalty.prox_(new, step)


def _curvature(here: Point, there: Point, step: float) -> float:
    """2·(f(u) − f(w) − ⟨∇f(w), u − w⟩)/‖u − w‖²: a step must not exceed its inverse."""
    move = _difference(there.weights, here.weights)
    length = _norm(move)
    if not (there.finite and math.isfinite(length * length)):
        return math.inf
    if length == 0:
        return 0.0
    eps = max(torch.finfo(w.dtype).eps for w in (*move, *_tensors(there.loss)))
    slope = total_inner(here.gradients, move)
    if length * length / (2 * step) > 1e3 * eps * (abs(here.value) + abs(there.value) + abs(slope)):
        above = there.value - here.value - slope
    else:
        # Near the solution the losses differ by less than they round. The gradients still tell: of a quadratic
        # exactly, of any other up to the third order of a move that is short by now.
        above = total_inner(_difference(there.gradients, here.gradients), move) / 2
    return max(0.0, 2 * above / length / length)


def _ceiling(params: Sequence[Tensor]) -> float:
    """The longest step on a loss without curvature: step·λ and step·gradient must not overflow in the prox."""
    return min(max(torch.finfo(w.dtype).max, torch.finfo(torch.float32).max) for w in params) ** 0.5


def _certificate(penalties: Sequence[Penalty | None], point: Point) -> float:
    return gathered(distances(*part) for part in zip(penalties, point.weights, point.gradients, strict=True))[1]


def _write(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for w, value in zip(params, values, strict=True):
        w.copy_(value)


def _difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    return [x - y for x, y in zip(a, b, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.hypot(*(torch.linalg.vector_norm(x).item() for x in tensors))


def _tensors(loss: Any) -> list[Tensor]:
    return [loss] if isinstance(loss, Tensor) else []
