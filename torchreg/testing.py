"""Certificates for a penalty or a step size of your own: call them from its tests."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchreg._tensors import Step
from torchreg.binding.regularizer import Regularizer
from torchreg.optim import StepSize, attach
from torchreg.penalties import L1, Penalty

__all__ = ["check_penalty", "check_step_size"]

Build = Callable[[list[nn.Parameter]], Optimizer]
Random = Callable[[float], Tensor]

GRADIENTS = [1e-4, -1e-2, 1.0, -30.0, 1e3]
IDLE = (5, 6, 7)  # steps at which the strength is 0
FACTORS = [1.0, 1.0, 2.0, 0.5]  # multiply the learning rate, in turn


# ---------------------------------------------------------------------- step sizes


def check_step_size(
    build: Callable[[list[nn.Parameter]], Optimizer],
    step_size: StepSize | None = None,
    *,
    steps: int = 20,
    settle: int = 0,
    rtol: float = 1e-9,
) -> None:
    """Certifies that a step size is the unit response of an optimizer, so that one λ has one answer.

    Under constant gradients from 1e-4 to 1e3, displacement over gradient must equal the step size, at every step. This
    must also hold when lr changes, and after steps at which the strength was 0 (see `after_update` in `StepSize`). A
    weight w ≠ 0 with the gradient −λ·sign(w) must not move, a zero with |gradient| < λ must stay zero, and a zero with
    |gradient| > λ must leave. A parameter without a gradient must not move.

    Args:
        build: makes the optimizer for a list of parameters. It must not decay the weights, which is another pull.
        step_size: the step size to certify; by default the one that `attach` uses for the class.
        steps: the number of steps to take.
        settle: the number of first steps that are not judged, for a response that is exact only in the limit: RMSprop
            with momentum needs 2,000.
        rtol: the relative error allowed; the weights are float64.
    Raises:
        AssertionError: the step size is not the unit response; the message names the step, the gradient and both
            numbers.

    >>> check_step_size(lambda params: torch.optim.RMSprop(params, lr=0.1))
    >>> check_step_size(lambda params: torch.optim.RMSprop(params, lr=0.1), tr.optim.learning_rate)
    Traceback (most recent call last):
    ...
    AssertionError: step 1: at gradient 0.0001 the optimizer moved by 9990.01·gradient, and the step is 0.1
    """
    _check_displacement(build, step_size, steps, settle, rtol)
    for strength in (1e-3, 1.0, 30.0):
        _check_rest(build, step_size, steps, settle, rtol, strength)


def _check_displacement(build: Build, step_size: StepSize | None, steps: int, settle: int, rtol: float) -> None:
    """Displacement over gradient is the step size that the penalty's prox was given."""
    gradient = torch.tensor([GRADIENTS], dtype=torch.float64)
    probe = Probe(1.0, [])
    proxes = 0
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
            f"step {t} moved a parameter without a gradient; it takes no step, so it must have no prox",
        )
        if t in IDLE:
            continue
        proxes += 1
        _demand(
            len(probe.steps) == proxes, f"step {t} applied {len(probe.steps) - proxes + 1} proxes to a parameter, not 1"
        )
        response = -_sign(optimizer) * model["moving"].detach() / gradient
        given = torch.as_tensor(probe.steps[-1], dtype=torch.float64).expand(gradient.shape)
        for g, moved, step in zip(gradient[0].tolist(), response[0].tolist(), given[0].tolist(), strict=True):
            _demand(
                t <= settle or abs(step - moved) <= rtol * abs(moved),
                f"step {t}: at gradient {g:g} the optimizer moved by {moved:g}·gradient, and the step is {step:g}",
            )


def _check_rest(
    build: Build, step_size: StepSize | None, steps: int, settle: int, rtol: float, strength: float
) -> None:
    """Under L1, weights stay at stationary points, and zeros stay or leave by their gradient."""
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
            f"step {t}: a weight with the gradient −λ·sign(w) at λ={strength:g} moved by {drift:g} of itself; it "
            "must stay where it is (weight decay is another pull: build the optimizer without it)",
        )
        _demand(weight[0, 3] == 0, f"step {t}: a zero with |gradient| = 0.9·λ, λ={strength:g}, became {weight[0, 3]:g}")
    _demand(weight[0, 4] != 0, f"a zero with |gradient| = 1.1·λ, λ={strength:g}, was still zero after {steps} steps")


# ---------------------------------------------------------------------- penalties


def check_penalty(penalty: Penalty, *, shape: tuple[int, ...] = (6, 4), rtol: float = 1e-9) -> None:
    """Certifies that the parts of a penalty belong together: its value, its prox and its class attributes.

    - The gradient of the value agrees with finite differences.
    - The prox beats many rival points, for a number and for tensor steps spread over four decades. A subgradient
      certifies the prox of a convex penalty. A grid over every weight, refined around its best point, certifies that of
      a separable penalty that is not convex. (At a tie either minimizer is right.)
    - A step of 0 leaves the weights unchanged, bit for bit, and `prox_` equals `prox`.
    - `scaled`, `is_zero`, `convex`, `separable` and `smooth` are true.
    - `coefficients`, `nearest_subgradient`, `dual_norm` and `conjugate` are right, if the penalty has them; and if it
      `linearizes`, its tangent lies nowhere below it.

    Args:
        penalty: a penalty with strengths that make a difference to weights around 1.
        shape: the shape of the weights to try.
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
    for zero in (0, 0.0, torch.zeros(shape)):
        _demand(torch.equal(penalty.prox(w, zero), w), f"{penalty}: a step of 0 must leave the weights as they are")
    _check_claims(penalty, w, random, rtol)
    _check_coefficients(penalty, w, rtol)
    if type(penalty).nearest_subgradient is not Penalty.nearest_subgradient:
        if penalty.convex:
            _check_certificates(penalty, random, rtol)
        else:
            _check_slopes(penalty, random)
        _check_dual_norm(penalty, random(1.0), rtol)


def _check_value(penalty: Penalty, w: Tensor, direction: Tensor) -> None:
    """The value is a finite scalar, and its gradient is its finite difference."""
    w = w.clone().requires_grad_()
    value = penalty(w)
    _demand(
        isinstance(value, Tensor) and value.requires_grad,
        f"{penalty}: the value must be a tensor with a gradient, or it does nothing in a loss; compute it from w, "
        "without .item() or .detach()",
    )
    _demand(
        bool(value.isfinite()),
        f"{penalty}: the value is {value:g}; it must be finite at every w, so a constraint is not a penalty",
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
            f"{penalty} says that it is smooth, but its gradient jumps at w = 0",
        )


def _check_prox(penalty: Penalty, w: Tensor, step: Step, random: Random, rtol: float) -> None:
    """No rival of the prox has a lower objective; if the penalty is convex, (w − prox)/step is a subgradient."""
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
            f"{penalty}: prox is not the argmin: its objective is {best:g}, and {better:g} was found, with step "
            f"{step if not isinstance(step, Tensor) else 'a tensor'}",
        )
        if penalty.convex:
            tangent = penalty(p) + ((w - p) / step * (rival - p)).sum()
            _demand(
                penalty(rival) >= tangent - slack,
                f"{penalty}: (w − prox(w, step))/step is not a subgradient at prox(w, step): elsewhere the penalty "
                f"is {penalty(rival):g}, below the tangent's {tangent:g}",
            )


def _check_every_weight(penalty: Penalty, w: Tensor, step: Step, rtol: float) -> None:
    """No weight finds a lower objective when it moves alone from where the prox leaves it."""
    p = penalty.prox(w, step)
    metric = torch.as_tensor(step, dtype=w.dtype).expand(w.shape).flatten()
    count, start, goal = w.numel(), w.flatten(), p.flatten()

    def objective(moved: Tensor) -> Tensor:
        """The objective for each entry of `moved`: that weight there, and all the others as in `p`."""
        one = torch.eye(count, dtype=torch.bool)
        each = torch.where(one, moved.unsqueeze(-1), goal).reshape(-1, *w.shape)
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
    """`w`, each weight scaled to where the prox begins to keep it: there a nonconvex penalty's prox may jump."""
    low, high = torch.zeros_like(w), torch.full_like(w, 1e4)
    for _ in range(40):
        middle = (low + high) / 2
        dead = penalty.prox(middle * w, step) == 0
        low, high = torch.where(dead, middle, low), torch.where(dead, high, middle)
    return high * w


def _check_tangent(penalty: Penalty, w: Tensor, step: Step, random: Random, rtol: float) -> None:
    """`linearized` gives a convex tangent from above with the same subgradients, and `prox` is that of the tangent."""
    start, gradient = torch.where(random(1.0) > 0, w, 0.0), random(1.0)
    tangent = penalty.linearized(start)
    _demand(tangent.convex, f"{penalty}: linearized(w) must be convex")
    _check_prox(tangent, w, step, random, rtol)
    for rival in _rivals(start, w, random):
        above = penalty(start) + tangent(rival) - tangent(start)
        _demand(
            penalty(rival) <= above + rtol * (above.abs() + tangent(rival)),
            f"{penalty}: linearized(w) is not a tangent from above: elsewhere it gives {above:g}, and the penalty is "
            f"{penalty(rival):g}",
        )
    _demand(
        torch.dist(tangent.subgradient(start, gradient), penalty.subgradient(start, gradient)) <= rtol,
        f"{penalty}: linearized(w) has other subgradients at w than the penalty, and so other stationary points",
    )
    _demand(
        torch.equal(penalty.prox(w, step), penalty.linearized(w).prox(w, step))
        and torch.equal(penalty.prox_(w.clone(), step), penalty.prox(w, step)),
        f"{penalty}: prox(w, step) must be the prox of linearized(w), and prox_ the same in place",
    )


def _rivals(p: Tensor, w: Tensor, random: Random) -> Iterator[Tensor]:
    """Points to compare with `p`, the prox of `w`: near and far, with and without its zeros, with a row of zeros."""
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


def _check_claims(penalty: Penalty, w: Tensor, random: Random, rtol: float) -> None:
    """`scaled`, `is_zero`, `convex` and `separable` are true."""
    if penalty.convex:
        doubled = torch.allclose(penalty.scaled(2.0)(w), 2 * penalty(w), rtol=rtol)
    else:  # λ is the slope at 0, and may set the width too
        doubled = torch.allclose(penalty.scaled(2.0)(1e-8 * w), 2 * penalty(1e-8 * w), rtol=1e-4, atol=0)
    _demand(doubled, f"{penalty}: scaled(2) must double it, or its slope at 0")
    _demand(
        penalty.is_zero or penalty != penalty.scaled(2.0),
        f"{penalty} equals itself with other strengths; put @dataclass(frozen=True) above its class",
    )
    nothing = penalty.scaled(0.0)
    _demand(nothing.is_zero and nothing(w) == 0, f"{penalty}: scaled(0) must be zero, and is_zero must be True")
    _demand(torch.equal(nothing.prox(w, 0.7), w), f"{penalty}: at strength 0 the prox must be the identity")
    other = random(1.0)
    if penalty.convex:
        middle, ends = penalty((w + other) / 2), (penalty(w) + penalty(other)) / 2
        _demand(middle <= ends * (1 + rtol), f"{penalty} says that it is convex, but lies above its chord")
    if penalty.separable:
        half = torch.arange(w.numel()).reshape(w.shape) % 2 == 0
        mixed = torch.where(half, w, other)
        apart = torch.where(half, penalty.prox(w, 0.7), penalty.prox(other, 0.7))
        _demand(
            torch.allclose(penalty.prox(mixed, 0.7), apart, rtol=rtol, atol=0),
            f"{penalty} says that it is separable, but the prox of a weight depends on the others",
        )
        broken = torch.where(half, w, torch.nan)
        _demand(torch.equal(penalty.prox(broken, 0.7)[half], apart[half]), f"{penalty}: a NaN spreads to other weights")


def _check_coefficients(penalty: Penalty, w: Tensor, rtol: float) -> None:
    """`coefficients` describes this penalty: kernels read them instead of calling `value` and `prox_map`."""
    found = penalty.coefficients()
    if found is None:
        return
    for x in (w, 3 * w):
        away = x if found.anchor is None else x - found.anchor.to(x)
        value = found.l1 * away.abs().sum() + found.l2 * away.square().sum()
        _demand(
            abs(value - penalty(x)) <= rtol * value,
            f"{penalty}: the value is {penalty(x):g}, but with its coefficients() {found.l1:g} of |w| and {found.l2:g} "
            f"of w² it is {value:g}",
        )


def _check_certificates(penalty: Penalty, random: Random, rtol: float) -> None:
    """`subgradient` gives the nearest subgradient, and `conjugate` is Ω*, of a convex penalty."""
    w, gradient, step = random(1.0), random(1.0), 0.7
    p = penalty.prox(w, step)
    another = (w - p) / step  # a subgradient at p, as _check_prox has made sure
    nearest = penalty.subgradient(p, gradient)
    for rival in _rivals(p, w, random):
        _demand(
            penalty(rival) >= penalty(p) + (nearest * (rival - p)).sum() - rtol * (1 + penalty(p)),
            f"{penalty}: subgradient(w, gradient) is not a subgradient: elsewhere the penalty is below its tangent",
        )
    _demand(
        torch.dist(-gradient, nearest) <= torch.dist(-gradient, another) * (1 + rtol),
        f"{penalty}: subgradient(w, gradient) is not the one nearest to −gradient",
    )
    if type(penalty).conjugate is not Penalty.conjugate:
        # v ∈ ∂Ω(p), made a little smaller: rounding decides on which side of an indicator's edge v lies.
        gap = penalty(p) + penalty.conjugate(another * (1 - rtol)) - (another * p).sum()
        _demand(abs(gap) <= 10 * rtol * (1 + penalty(p)), f"{penalty}: Ω(w) + Ω*(v) must be ⟨v, w⟩ for v ∈ ∂Ω(w)")
        for v in (random(0.1), random(10.0)):
            conjugate = penalty.conjugate(v)
            for z in (random(1.0), v, 10 * v, 1000 * v):
                _demand(
                    penalty(z) + conjugate >= (v * z).sum() - rtol * (1 + penalty(z)),
                    f"{penalty}: Ω*(v) is {conjugate:g}, but ⟨v, w⟩ − Ω(w) is {(v * z).sum() - penalty(z):g} at some w",
                )


def _check_slopes(penalty: Penalty, random: Random) -> None:
    """A short proximal step moves a weight by step·(the smallest subgradient of loss + Ω)."""
    step, w, gradient = 1e-9, torch.where(random(1.0) > 0, random(1.0), 0.0), random(1.0)
    moved = (w - penalty.prox(w - step * gradient, step)) / step
    least = gradient + penalty.subgradient(w, gradient)
    _demand(
        torch.dist(moved, least) <= 1e-4 * (1 + torch.dist(least, torch.zeros_like(least))),
        f"{penalty}: subgradient(w, gradient) is not the one nearest to −gradient: a short step of the prox differs",
    )


def _check_dual_norm(penalty: Penalty, gradient: Tensor, rtol: float) -> None:
    """With strengths above `dual_norm(gradient)` zero is stationary, and below it is not."""
    try:
        c = penalty.dual_norm(gradient).item()
    except NotImplementedError:
        return
    if c < float("inf"):
        zero = torch.zeros_like(gradient)
        for factor, rests in ((1 + 1e-6, True), (1 - 1e-3, False)):
            distance = torch.dist(-gradient, penalty.scaled(c * factor).subgradient(zero, gradient))
            _demand(
                (distance <= rtol) == rests,
                f"{penalty}: with its strengths times {c * factor:g} zero is {'not ' if rests else ''}stationary, but "
                f"dual_norm says that it is from {c:g} on",
            )


@dataclasses.dataclass(frozen=True)
class Probe(Penalty):
    """A penalty that records the steps its prox gets, and moves nothing."""

    strength: float
    steps: list[Step]

    name = "probe"
    formula = "0"
    convex = True
    separable = True
    smooth = True

    def value(self, w: Tensor) -> Tensor:
        return 0 * w.sum()

    def prox_map(self, w: Tensor, step: Step) -> Tensor:
        self.steps.append(step.clone() if isinstance(step, Tensor) else step)
        return w


def _no_loss() -> float:
    """A closure for optimizers that need one. The gradients are already there."""
    return 0.0


def _demand(holds: object, message: str) -> None:
    """Raises an AssertionError unless `holds`. Unlike `assert` it also works under `python -O`."""
    if not holds:
        raise AssertionError(message)


def _sign(optimizer: Optimizer) -> int:
    """1, and −1 if the optimizer maximizes."""
    return -1 if any(group.get("maximize") for group in optimizer.param_groups) else 1
