"""Certificates for a penalty or a step size of one's own: call them from its tests."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchreg._tensors import Step
from torchreg.binding.regularizer import Regularizer
from torchreg.optim import StepSize, attach
from torchreg.penalties import L1, Penalty

__all__ = ["check_penalty", "check_step_size"]

GRADIENTS = [1e-4, -1e-2, 1.0, -30.0, 1e3]
IDLE = (5, 6, 7)  # steps at which the strength is 0
FACTORS = [1.0, 1.0, 2.0, 0.5]  # of the learning rate, in turn


def check_step_size(
    build: Callable[[list[nn.Parameter]], Optimizer],
    step_size: StepSize | None = None,
    *,
    steps: int = 20,
    settle: int = 0,
    rtol: float = 1e-9,
) -> None:
    """Certifies that a step size is the unit response of an optimizer, so that one λ has one answer.

    Under constant gradients from 1e-4 to 1e3, displacement over gradient must be the step, at every step and through
    changes of lr where there is one, also when the strength has been 0 for a while (see `follow` in `StepSize`). A
    weight w ≠ 0 with the gradient −λ·sign(w) must stay where it is, a zero with |gradient| < λ must stay one, and one
    with |gradient| > λ must leave. A parameter without a gradient must not move.

    Args:
        build: makes the optimizer for a list of parameters, without any decay, which is another pull.
        step_size: what is certified; by default what `attach` uses for the class.
        steps: how many steps to take.
        settle: how many first steps are not judged, for a response that is exact only in the limit: RMSprop with
            momentum needs 2,000.
        rtol: the relative error allowed; the weights are float64.
    Raises:
        AssertionError: it is not the unit response; the message names the step, the gradient and both numbers.

    >>> check_step_size(lambda params: torch.optim.RMSprop(params, lr=0.1))
    >>> check_step_size(lambda params: torch.optim.RMSprop(params, lr=0.1), tr.optim.learning_rate)
    Traceback (most recent call last):
    ...
    AssertionError: step 1: at gradient 0.0001 the optimizer moved by 9990.01·gradient, and the step is 0.1
    """
    _check_displacement(build, step_size, steps, settle, rtol)
    for strength in (1e-3, 1.0, 30.0):
        _check_rest(build, step_size, steps, settle, rtol, strength)


def _check_displacement(
    build: Callable[[list[nn.Parameter]], Optimizer], step_size: StepSize | None, steps: int, settle: int, rtol: float
) -> None:
    gradient = torch.tensor([GRADIENTS], dtype=torch.float64)
    probe = Probe(1.0, [])
    asked = 0
    model = nn.ParameterDict({"moving": torch.zeros_like(gradient), "still": torch.ones_like(gradient)})
    optimizer = build(list(model.parameters()))
    reg = Regularizer(model, probe)
    attach(optimizer, reg, step_size=step_size)
    rates = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
    for t, factor in zip(range(1, steps + 1), itertools.cycle(FACTORS), strict=False):
        model["moving"].detach().zero_()  # from 0 the difference is exact, and no decay acts
        model["moving"].grad = gradient.clone()
        for group, lr in rates:
            group["lr"] = lr * factor
        reg["probe"].factor = float(t not in IDLE)
        optimizer.step(_no_loss)
        _demand(
            torch.equal(model["still"], torch.ones_like(gradient)),
            f"step {t} moved a parameter without a gradient; it has taken no step, so it has no prox",
        )
        if t in IDLE:
            continue
        asked += 1
        _demand(
            len(probe.steps) == asked, f"step {t} applied {len(probe.steps) - asked + 1} proxes to a parameter, not 1"
        )
        moved = -_sign(optimizer) * model["moving"].detach() / gradient
        found = torch.as_tensor(probe.steps[-1], dtype=torch.float64).expand(gradient.shape)
        for g, by, step in zip(gradient[0].tolist(), moved[0].tolist(), found[0].tolist(), strict=True):
            _demand(
                t <= settle or abs(step - by) <= rtol * abs(by),
                f"step {t}: at gradient {g:g} the optimizer moved by {by:g}·gradient, and the step is {step:g}",
            )


def _check_rest(
    build: Callable[[list[nn.Parameter]], Optimizer],
    step_size: StepSize | None,
    steps: int,
    settle: int,
    rtol: float,
    strength: float,
) -> None:
    start = torch.tensor([[0.5, -2.0, 3.0, 0.0, 0.0]], dtype=torch.float64)
    gradient = strength * torch.tensor([[-1.0, 1.0, -1.0, 0.9, 1.1]], dtype=torch.float64)
    model = nn.ParameterDict({"weight": start.clone()})
    optimizer = build(list(model.parameters()))
    attach(optimizer, Regularizer(model, L1(strength)), step_size=step_size)
    weight = model["weight"]
    for t in range(1, steps + 1):
        if t <= settle:
            weight.detach().copy_(start)
        before = weight.detach().clone()
        weight.grad = _sign(optimizer) * gradient
        optimizer.step(_no_loss)
        if t <= settle:
            continue
        drift = ((weight - before) / start)[0, :3].abs().max().item()
        _demand(
            drift <= rtol,
            (
                f"step {t}: a weight with the gradient −λ·sign(w) at λ={strength:g} moved by {drift:g} of itself; "
                "it must stay where it is (a decay would be another pull: build the optimizer without)"
            ),
        )
        _demand(weight[0, 3] == 0, f"step {t}: a zero with |gradient| = 0.9·λ, λ={strength:g}, became {weight[0, 3]:g}")
    _demand(weight[0, 4] != 0, f"a zero with |gradient| = 1.1·λ, λ={strength:g}, was still one after {steps} steps")


def check_penalty(penalty: Penalty, *, shape: tuple[int, ...] = (6, 4), rtol: float = 1e-9) -> None:
    """Certifies that the parts of a penalty belong together: its value, its prox and what it says of itself.

    The gradient of the value is its finite difference. The prox, with a number and with tensor steps spread over four
    decades, is no worse than any of many rivals; for a convex penalty a subgradient certifies it, for a separable one
    that is not convex a grid over every weight, refined where it is best. (At a tie either minimizer is right.) A step
    of 0 leaves the weights as they are, bit for bit; `prox_` is `prox`. `scaled`, `is_zero`, `convex` and `separable`
    hold. A penalty that has `_subgradient`, `_dual_norm` and `_conjugate` is held to them as well, and one that
    `linearizes` to a tangent that nowhere lies below it.

    Args:
        penalty: with strengths that make a difference to weights around 1.
        shape: of the weights to try.
        rtol: the relative error allowed; the weights are float64.
    Raises:
        AssertionError: something does not hold; the message says what, and where.

    >>> check_penalty(L1(0.3))
    """
    generator = torch.Generator().manual_seed(0)

    def random(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    w = random()
    _check_value(penalty, w, random())
    for step in (0.7, torch.exp(random(2.0)), torch.exp(random(2.0))[..., :1]):
        for scale in (0.1, 1.0, 10.0):
            x = random(scale)
            if penalty.linearizes:
                _check_tangent(penalty, x, step, random, rtol)
                continue
            _check_prox(penalty, x, step, random, rtol)
            if penalty.separable and not penalty.convex:
                _check_every_weight(penalty, x, step, rtol)
                edge = _edge(penalty, x, step)
                for factor in (0.99, 1.01):
                    _check_every_weight(penalty, factor * edge, step, rtol)
    for nothing in (0, 0.0, torch.zeros(shape)):
        _demand(torch.equal(penalty.prox(w, nothing), w), f"{penalty}: a step of 0 must leave the weights as they are")
    _check_claims(penalty, w, random, rtol)
    if type(penalty)._subgradient is not Penalty._subgradient:
        if penalty.convex:
            _check_certificates(penalty, random, rtol)
        else:
            _check_slopes(penalty, random)
        _check_dual_norm(penalty, random(1.0), rtol)


def _check_value(penalty: Penalty, w: Tensor, direction: Tensor) -> None:
    w = w.clone().requires_grad_()
    value = penalty(w)
    _demand(
        isinstance(value, Tensor) and value.requires_grad,
        f"{penalty}: the value must be a tensor with a gradient, or it does nothing in a loss; compute it from w, "
        "without .item() or .detach()",
    )
    _demand(
        bool(value.isfinite()), f"{penalty}: the value is {value:g}; it must be finite at every w, and so no constraint"
    )
    _demand(value.shape == () and value.is_floating_point(), f"{penalty}: the value must be a 0-d real tensor")
    (gradient,) = torch.autograd.grad(value, w)
    with torch.no_grad():
        h = 1e-6 * direction
        difference = (penalty(w + h) - penalty(w - h)) / 2
        expected = (gradient * h).sum()
    _demand(
        abs(difference - expected) <= 1e-5 * (h * gradient).abs().sum() + 1e-13 * abs(value.detach()),
        f"{penalty}: the gradient of the value gives the slope {expected / 1e-6:g}, "
        f"its difference {difference / 1e-6:g}",
    )
    zero = torch.zeros_like(w).requires_grad_()
    (gradient,) = torch.autograd.grad(penalty(zero), zero)
    _demand(bool(gradient.isfinite().all()), f"{penalty}: the gradient of the value at w = 0 must be finite")
    if penalty.smooth:
        sides = [(h * direction).requires_grad_() for h in (1e-9, -1e-9)]
        right, left = (torch.autograd.grad(penalty(side), side)[0] for side in sides)
        _demand(
            torch.dist(right, left) <= 1e-6 * (1 + gradient.abs().max()),
            f"{penalty} says that it is smooth, and its gradient jumps at w = 0",
        )


def _check_prox(penalty: Penalty, w: Tensor, step: Step, random: Callable[[float], Tensor], rtol: float) -> None:
    before = w.clone()
    try:
        p = penalty.prox(w, step)
    except AttributeError as error:
        raise AssertionError(f"{penalty}: prox must return a tensor; {error}") from error
    _demand(torch.equal(w, before), f"{penalty}: prox must return a new tensor and leave w alone")
    _demand(p.shape == w.shape and p.dtype == w.dtype, f"{penalty}: prox must keep shape and dtype")
    _demand(torch.equal(penalty.prox_(w.clone(), step), p), f"{penalty}: prox_ must be prox, in place")

    def objective(u: Tensor) -> Tensor:
        return ((u - w).square() / (2 * step)).sum() + penalty(u)

    best = objective(p)
    slack = rtol * (best.abs() + (w.square() / step).sum())
    for rival in _rivals(p, w, random):
        better = objective(rival)
        _demand(
            best <= better + slack,
            (
                f"{penalty}: prox is not the argmin: its objective is {best:g}, and {better:g} was found, with step "
                f"{step if not isinstance(step, Tensor) else 'a tensor'}"
            ),
        )
        if penalty.convex:
            binding = penalty(p) + ((w - p) / step * (rival - p)).sum()
            _demand(
                penalty(rival) >= binding - slack,
                (
                    f"{penalty}: (w − prox(w, step))/step is no subgradient at prox(w, step): the penalty elsewhere is "
                    f"{penalty(rival):g}, and the subgradient promises {binding:g}"
                ),
            )


def _check_every_weight(penalty: Penalty, w: Tensor, step: Step, rtol: float) -> None:
    """No weight, moved alone from where the prox leaves it, finds a lower objective."""
    p = penalty.prox(w, step)
    metric = torch.as_tensor(step, dtype=w.dtype).expand(w.shape).flatten()
    count, start, goal = w.numel(), w.flatten(), p.flatten()

    def objective(moved: Tensor) -> Tensor:
        """For each row of `moved`, one number for each weight that is put in its place, the others as in `p`."""
        own = torch.eye(count, dtype=torch.bool)
        each = torch.where(own, moved.unsqueeze(-1), goal).reshape(-1, *w.shape)
        return (moved - start).square() / (2 * metric) + torch.vmap(penalty)(each).reshape(moved.shape)

    here = objective(goal[None])[0]
    slack = rtol * (here.abs() + start.square() / metric)
    width, best = start, start / 2
    for points in (801, 101, 101):
        spread = torch.linspace(-1.5, 1.5, points, dtype=w.dtype)[:, None]
        grid = torch.cat([torch.zeros_like(best)[None], best + spread * width])  # 0 to the last bit, for L0
        values = objective(grid)
        best, width = grid.gather(0, values.argmin(0)[None])[0], 3 * width / (points - 1)
        worst = (here - values.amin(0) - slack).argmax()
        _demand(
            (here <= values.amin(0) + slack)[worst],
            f"{penalty}: prox is not the argmin: it takes {start[worst]:g} at step {metric[worst]:g} to "
            f"{goal[worst]:g}, and the objective is lower at {best[worst]:g}",
        )


def _edge(penalty: Penalty, w: Tensor, step: Step) -> Tensor:
    """`w` scaled, weight by weight, to where the prox begins to keep it: where one that is not convex may jump."""
    low, high = torch.zeros_like(w), torch.full_like(w, 1e4)
    for _ in range(40):
        middle = (low + high) / 2
        dead = penalty.prox(middle * w, step) == 0
        low, high = torch.where(dead, middle, low), torch.where(dead, high, middle)
    return high * w


def _check_tangent(penalty: Penalty, w: Tensor, step: Step, random: Callable[[float], Tensor], rtol: float) -> None:
    start, gradient = torch.where(random(1.0) > 0, w, 0.0), random(1.0)
    tangent = penalty.linearized(start)
    _demand(tangent.convex, f"{penalty}: linearized(w) must be convex")
    _check_prox(tangent, w, step, random, rtol)
    for rival in _rivals(start, w, random):
        above = penalty(start) + tangent(rival) - tangent(start)
        _demand(
            penalty(rival) <= above + rtol * (above.abs() + tangent(rival)),
            f"{penalty}: linearized(w) is no tangent from above: elsewhere it gives {above:g}, and the penalty is "
            f"{penalty(rival):g}",
        )
    _demand(
        torch.dist(tangent.subgradient(start, gradient), penalty.subgradient(start, gradient)) <= rtol,
        f"{penalty}: linearized(w) has other subgradients at w, and so other points to rest at",
    )
    _demand(
        torch.equal(penalty.prox(w, step), penalty.linearized(w).prox(w, step))
        and torch.equal(penalty.prox_(w.clone(), step), penalty.prox(w, step)),
        f"{penalty}: prox(w, step) must be that of linearized(w), and prox_ the same in place",
    )


def _rivals(p: Tensor, w: Tensor, random: Callable[[float], Tensor]) -> Iterator[Tensor]:
    yield from (w, torch.zeros_like(w), p * 1.01, p * 0.99, (p + w) / 2)
    for scale in (1e-4, 1e-2, 1.0):
        yield p + random(scale)
        yield p + random(scale) * (p != 0)
    for index in range(p.shape[0] if p.dim() else 0):
        without = p.clone()
        without[index] = 0
        yield without
        with_ = p.clone()
        with_[index] += 0.01 * (w - p)[index]
        yield with_


def _check_claims(penalty: Penalty, w: Tensor, random: Callable[[float], Tensor], rtol: float) -> None:
    if penalty.convex:
        doubled = torch.allclose(penalty.scaled(2.0)(w), 2 * penalty(w), rtol=rtol)
    else:  # λ is the slope at 0, and may set the width too
        doubled = torch.allclose(penalty.scaled(2.0)(1e-8 * w), 2 * penalty(1e-8 * w), rtol=1e-4, atol=0)
    _demand(doubled, f"{penalty}: scaled(2) must double it, or its slope at 0")
    _demand(
        penalty.is_zero or penalty != penalty.scaled(2.0),
        f"{penalty} equals itself with other strengths; put @dataclass(frozen=True, repr=False) above its class",
    )
    nothing = penalty.scaled(0.0)
    _demand(nothing.is_zero and nothing(w) == 0, f"{penalty}: scaled(0) must be zero, and is_zero say so")
    _demand(torch.equal(nothing.prox(w, 0.7), w), f"{penalty}: at strength 0 the prox must be the identity")
    other = random(1.0)
    if penalty.convex:
        middle, ends = penalty((w + other) / 2), (penalty(w) + penalty(other)) / 2
        _demand(middle <= ends * (1 + rtol), f"{penalty} says that it is convex, and lies above its chord")
    if penalty.separable:
        half = torch.arange(w.numel()).reshape(w.shape) % 2 == 0
        mixed = torch.where(half, w, other)
        apart = torch.where(half, penalty.prox(w, 0.7), penalty.prox(other, 0.7))
        _demand(
            torch.allclose(penalty.prox(mixed, 0.7), apart, rtol=rtol, atol=0),
            f"{penalty} says that it is separable, and the prox of a weight depends on the others",
        )
        hurt = torch.where(half, w, torch.nan)
        _demand(torch.equal(penalty.prox(hurt, 0.7)[half], apart[half]), f"{penalty}: a NaN spreads to other weights")


def _check_certificates(penalty: Penalty, random: Callable[[float], Tensor], rtol: float) -> None:
    w, gradient, step = random(1.0), random(1.0), 0.7
    p = penalty.prox(w, step)
    another = (w - p) / step  # a subgradient at p, as _check_prox has made sure
    nearest = penalty.subgradient(p, gradient)
    for rival in _rivals(p, w, random):
        _demand(
            penalty(rival) >= penalty(p) + (nearest * (rival - p)).sum() - rtol * (1 + penalty(p)),
            f"{penalty}: subgradient(w, gradient) is none: the penalty elsewhere falls below its tangent",
        )
    _demand(
        torch.dist(-gradient, nearest) <= torch.dist(-gradient, another) * (1 + rtol),
        f"{penalty}: subgradient(w, gradient) is not the one nearest to −gradient",
    )
    if type(penalty)._conjugate is not Penalty._conjugate:
        # v ∈ ∂Ω(p), drawn in a little: an indicator's edge is a matter of rounding.
        equal = penalty(p) + penalty._conjugate(another * (1 - rtol)) - (another * p).sum()
        _demand(abs(equal) <= 10 * rtol * (1 + penalty(p)), f"{penalty}: Ω(w) + Ω*(v) must be ⟨v, w⟩ for v ∈ ∂Ω(w)")
        for v in (random(0.1), random(10.0)):
            conjugate = penalty._conjugate(v)
            for z in (random(1.0), v, 10 * v, 1000 * v):
                _demand(
                    penalty(z) + conjugate >= (v * z).sum() - rtol * (1 + penalty(z)),
                    f"{penalty}: Ω*(v) is {conjugate:g}, and ⟨v, w⟩ − Ω(w) is {(v * z).sum() - penalty(z):g} at some w",
                )


def _check_slopes(penalty: Penalty, random: Callable[[float], Tensor]) -> None:
    """A short proximal step moves a weight by step·(the least subgradient)."""
    step, w, gradient = 1e-9, torch.where(random(1.0) > 0, random(1.0), 0.0), random(1.0)
    moved = (w - penalty.prox(w - step * gradient, step)) / step
    least = gradient + penalty.subgradient(w, gradient)
    _demand(
        torch.dist(moved, least) <= 1e-4 * (1 + torch.dist(least, torch.zeros_like(least))),
        f"{penalty}: subgradient(w, gradient) is not the one nearest to −gradient: a short step of the prox differs",
    )


def _check_dual_norm(penalty: Penalty, gradient: Tensor, rtol: float) -> None:
    try:
        c = penalty._dual_norm(gradient).item()
    except NotImplementedError:
        return
    if c < float("inf"):
        zero = torch.zeros_like(gradient)
        for factor, rests in ((1 + 1e-6, True), (1 - 1e-3, False)):
            left = torch.dist(-gradient, penalty.scaled(c * factor).subgradient(zero, gradient))
            _demand(
                (left <= rtol) == rests,
                f"{penalty}: with its strengths times {c * factor:g} zero is {'not ' if rests else ''}stationary, and "
                f"_dual_norm says that {c:g} is where that begins",
            )


@dataclasses.dataclass(frozen=True, repr=False)
class Probe(Penalty):
    """Writes down the steps that its prox is given, and moves nothing."""

    strength: float
    steps: list[Step]

    name: ClassVar[str] = "probe"
    formula: ClassVar[str] = "0"
    strengths: ClassVar[tuple[str, ...]] = ("strength",)
    convex: ClassVar[bool] = True
    separable: ClassVar[bool] = True
    smooth: ClassVar[bool] = True

    def _value(self, w: Tensor) -> Tensor:
        return 0 * w.sum()

    def _prox(self, w: Tensor, step: Step) -> Tensor:
        self.steps.append(step.clone() if isinstance(step, Tensor) else step)
        return w


def _no_loss() -> float:
    """A closure for the optimizers that ask for one; the gradients are there already."""
    return 0.0


def _demand(holds: object, message: str) -> None:
    """An assertion that `python -O` keeps."""
    if not holds:
        raise AssertionError(message)


def _sign(optimizer: Optimizer) -> int:
    return -1 if any(group.get("maximize") for group in optimizer.param_groups) else 1
