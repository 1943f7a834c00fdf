"""Certificates: do the weights solve loss + penalty, how much is left to gain, and from which λ on are they zero?"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from torchreg._distributed import fsdp_parameters, is_sharded, local_part, reshard, shard_layout, unsharded
from torchreg._tensors import widened
from torchreg.binding import selection
from torchreg.binding.bindings import Binding
from torchreg.binding.regularizer import Regularizer
from torchreg.penalties import Penalty
from torchreg.penalties.base import inner

Closure = Callable[[], Tensor]
"""Gives the data loss at the present weights, a 0-d tensor that autograd can follow, and calls no `backward()`."""


@dataclass(frozen=True, repr=False)
class Stationarity:
    """How far −gradient of the data loss is from the subgradients of the penalty: 0 at a stationary point.

    Attributes:
        total: the Euclidean distance over all parameters that train.
        relative: total / max(‖gradient‖, ‖subgradient‖), between 0 and 2 and free of the loss's scale. It is 1 where
            no penalty acts and the gradient is not 0, however small that is.
        by_term: the distance over the parameters of each term, by its key.
        rest: ‖gradient‖ over the parameters that train without a penalty.
    """

    total: float
    relative: float
    by_term: Mapping[str, float]
    rest: float

    def __repr__(self) -> str:
        terms = ", ".join(f"{key!r}: {value:.3g}" for key, value in self.by_term.items())
        return (
            f"Stationarity(total={self.total:.3g}, relative={self.relative:.3g}, "
            f"by_term={{{terms}}}, rest={self.rest:.3g})"
        )


def stationarity(reg: Regularizer, closure: Closure | None = None) -> Stationarity:
    """The Euclidean distance of −∇f(w) to ∂Ω(w), with f the data loss and Ω the penalty of `reg`, for any network.

    It is 0 exactly where the weights are stationary: ∇f = −λ·sign(w) at the nonzero weights of L1 and |∇f| ≤ λ at its
    zeros. For a convex problem these are the solutions. Frozen parameters do not count, and while `reg` is disabled
    its penalties are 0.

    Args:
        reg: whose penalties to certify.
        closure: returns the data loss on all the data, without `backward()`; `reg()` in it counts as 0. No `.grad`
            changes. Put the model in evaluation mode first: dropout makes another loss of each call, and batch norm
            would count this one in its running statistics. Without a closure `.grad` is read, as `backward()` of
            the data loss left it: call it before `optimizer.step()` moves the weights, and with a GradScaler after
            `scaler.unscale_(optimizer)`.
    Returns:
        The distances as numbers, total and by term. Reading them waits for the device. Under DDP and `fully_shard` the
        loss is the mean of those of all processes, and each of them has to call this.
    Raises:
        TypeError: `reg` is no regularizer, or the closure cannot be called or returns no tensor.
        ValueError: the closure's loss is not a scalar with a gradient, or it called `backward()`; or, without a
            closure, `.grad` may hold the penalty's gradient too, or nothing at all.
        NotImplementedError: a penalty does not say what its subgradients are.
        RuntimeError: a selected parameter is computed by a parametrization.
    Source: Rockafellar and Wets, 1998, theorem 10.1 (Fermat's rule).

    >>> model = nn.Linear(3, 1)
    >>> reg = Regularizer(model, L1(0.1))
    >>> optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.2, momentum=0.9, regularizer=reg)
    >>> x, y = torch.eye(3), torch.tensor([[3.0], [0.2], [-0.2]])
    >>> for step in range(1000):
    ...     optimizer.zero_grad()
    ...     nn.functional.mse_loss(model(x), y).backward()
    ...     if tr.stationarity(reg).relative <= 1e-5:  # reads the .grad that is there anyway
    ...         break
    ...     optimizer.step()
    >>> step < 999
    True
    >>> tr.stationarity(reg, lambda: nn.functional.mse_loss(model(x), y)).relative <= 1e-5
    True
    """
    bindings, rest = _trainable(reg), _unpenalized(reg)
    parameters = [*(binding.parameter() for binding in bindings), *rest]
    gradients = _left_behind(reg, bindings, parameters) if closure is None else _evaluate(reg, closure, parameters)[1]
    penalties = [*_penalties(reg, bindings), *(None for _ in rest)]
    parts = [distances(*part) for part in zip(penalties, parameters, gradients, strict=True)]
    own = list(zip(bindings, parts[: len(bindings)], strict=True))
    total, relative = gathered(parts)
    return Stationarity(
        total,
        relative,
        {key: math.hypot(*(part[0] for binding, part in own if binding.term.key == key)) for key in reg},
        math.hypot(*(part[0] for part in parts[len(bindings) :])),
    )


def lambda_max(reg: Regularizer, closure: Closure) -> dict[str, float]:
    """The smallest λ at which all weights of a term are stationary at zero: where its regularization path starts.

    The weights of every term are set to zero together (with `toward` to their anchor), the loss is evaluated once, and
    all is put back bit for bit. λ_max = max|∇f| for L1, max‖∇f‖/weight over the groups for the group lasso. Parameters
    without a penalty stay as they are: fit them first, with all weights at zero (the intercept, say). For a
    linear model it is then global. For a deep network it is local, and often 0: at zero weights little has a gradient.

    Args:
        reg: whose terms to measure; `disabled()` makes no difference.
        closure: returns the data loss, as in `stationarity`.
    Returns:
        By term, λ in units of the term's first strength that is not 0, with the others in proportion and `scale`
        counted in: with a factor of 1, `reg[key].strength = value` puts it exactly there. A term whose strengths are
        all 0 counts as if the first were 1. inf for a term that holds no weight at zero, such as L2; its weights then
        stay as they are, and so does every parameter with a `scale` of 0.
    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as in `stationarity`; the weights are put back.
    Source: Friedman, Hastie and Tibshirani, 2010, section 2.5.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> reg = Regularizer(model, L1(0.1))
    >>> x, y = torch.eye(3), torch.tensor([[3.0], [0.6], [-0.3]])
    >>> lambda_max(reg, lambda: nn.functional.mse_loss(model(x), y))
    {'l1': 2.0}
    """
    bindings = _trainable(reg)
    units = {key: _unit(term.base) for key, term in reg.terms.items()}
    penalties = [units[binding.term.key].scaled(binding.scale) for binding in bindings]
    parameters = [binding.parameter() for binding in bindings]
    corners = {
        i: torch.zeros_like(w) if binding.anchor is None else binding.anchor.to(w.dtype)
        for i, (binding, penalty, w) in enumerate(zip(bindings, penalties, parameters, strict=True))
        if penalty._dual_norm(torch.ones(w.shape, dtype=widened(w).dtype, device=w.device)) < math.inf
    }
    with _placed([parameters[i] for i in corners], list(corners.values())):
        gradients = _evaluate(reg, closure, parameters)[1]
    norms: dict[str, list[float]] = {key: [] for key in units}
    for i in corners:
        gradient = widened(unsharded(gradients[i]))  # one is whole at a time
        norms[bindings[i].term.key].append(penalties[i]._dual_norm(gradient).item())
    return {key: _largest(found) for key, found in norms.items()}


def duality_gap(reg: Regularizer, closure: Closure) -> float:
    """An upper bound of (f + Ω)(w) − min(f + Ω), for a data loss f ≥ 0 that is convex in the selected weights.

    So for linear models: what training further could still gain is at most this. It is 0 at the solution alone. The
    minimum is over the selected weights that train; all other parameters are taken as they are.

    With g = ∇f(w) and α ≤ 1 the largest for which Ω*(−αg) is finite, the gap is

        Ω(w) + Ω*(−αg) + α⟨w, g⟩ + (1 − α)·f(w),

    as f*(αg) ≤ α·f*(g) for a convex f ≥ 0. Where f is quadratic, (1 − α)² takes the place of (1 − α); for the lasso
    that is scikit-learn's `dual_gap_`. It counts as quadratic if f(u) − f(w) = ½⟨u − w, ∇f(u) + ∇f(w)⟩ to rounding at
    three points u about as far off as f can fall; the weights are then put back bit for bit.

    Args:
        reg: whose penalties to certify; while it is disabled Ω = 0.
        closure: returns the data loss, as in `stationarity`. Whether it is convex is not checked.
    Returns:
        The bound, in units of the loss. Sums are taken in double precision on the CPU, the loss and its gradient as
        the closure gives them.
    Raises:
        ValueError: a penalty is not convex, the loss is negative where the bound needs f ≥ 0, or a weight is sharded.
        TypeError, NotImplementedError, RuntimeError: as in `stationarity`.
    Source: Boyd and Vandenberghe, 2004, section 5.5; Ndiaye, Fercoq, Gramfort and Salmon, 2017, for the scaling by α.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> reg = Regularizer(model, L1(0.5))
    >>> x, y = torch.eye(3), torch.tensor([[3.0], [0.6], [-0.3]])
    >>> solution = torch.tensor([[2.25, 0.0, 0.0]])  # of MSE + ½Σ|w|: 3 less λ·n/2
    >>> _ = model.load_state_dict({"weight": solution})
    >>> duality_gap(reg, lambda: nn.functional.mse_loss(model(x), y)) < 1e-6
    True
    """
    bindings = _trainable(reg)
    for binding in bindings:
        if is_sharded(binding.parameter()):
            raise ValueError(
                f"{binding.name} is sharded, and the gap is computed from whole weights and the whole loss; use "
                "stationarity(reg, closure), or load the weights into one process"
            )
        if not binding.penalty.convex:
            raise ValueError(
                f"{binding.name} has the penalty {binding.penalty!r}, which is not convex, so that no dual bounds its "
                "minimum; use stationarity(reg, closure)"
            )
    penalties = _penalties(reg, bindings)
    parameters = [binding.parameter() for binding in bindings]
    loss, gradients = _evaluate(reg, closure, parameters)
    f, ws, gs = loss.item(), _exact(parameters), _exact(gradients)
    value = sum(penalty._value(w).item() for penalty, w in zip(penalties, ws, strict=True))
    slope = total_inner(ws, gs)
    if not math.isfinite(f + value + slope):
        return math.nan
    alpha, conjugate = _dual_point(penalties, gs)
    short = 1 - alpha
    if short > 0:
        _check_nonnegative(f)
        if _is_quadratic(reg, closure, parameters, loss, gradients):
            short *= short
    return max(0.0, value + conjugate + alpha * slope + short * f)


# ---------------------------------------------------------------------- distances and inner products


def distances(penalty: Penalty | None, w: Tensor, gradient: Tensor) -> tuple[float, float, float]:
    """‖gradient + subgradient‖, ‖gradient‖ and ‖subgradient‖ of one parameter, in one read of the device."""
    w, gradient = widened(w.detach()), widened(gradient)
    shard = shard_layout(w)
    if shard is not None:
        w, gradient = local_part(w), shard.part(gradient)
        penalty = None if penalty is None else penalty._on(shard)
    subgradient = torch.zeros_like(gradient) if penalty is None else penalty._subgradient(w, gradient)
    norms = torch.stack([torch.linalg.vector_norm(x) for x in (gradient + subgradient, gradient, subgradient)])
    distance, slope, pull = (norms if shard is None else shard.peers.sum(norms.square()).sqrt()).tolist()
    return distance, slope, pull


def gathered(parts: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """The `distances` of several parameters as one: total and relative."""
    total, slope, pull = (math.hypot(*column) for column in zip((0.0, 0.0, 0.0), *parts, strict=True))
    return total, total / max(slope, pull, sys.float_info.min)  # 0/0 is 0, and a NaN stays one


def total_inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Re⟨a, b⟩ over all the tensors of two lists."""
    return math.fsum(inner(x, y).item() for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------- parameters and gradients


def read_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """What stands in `.grad`; zeros where nothing does."""
    return [torch.zeros_like(w) if w.grad is None else w.grad.to_dense() for w in parameters]


def _trainable(reg: Regularizer) -> list[Binding]:
    """The selected parameters, but for the frozen ones."""
    if not isinstance(reg, Regularizer):
        raise TypeError(f"reg is a {type(reg).__name__}; build one first: Regularizer(model, L1(1e-4))")
    bindings = reg.bindings()
    for binding in bindings:
        if binding.selected.computed:
            raise RuntimeError(
                f"{binding.name} is computed by a parametrization, so it is no parameter to be certified; remove the "
                "parametrization, or exclude it"
            )
    return [binding for binding in bindings if binding.parameter().requires_grad]


def _unpenalized(reg: Regularizer) -> list[Tensor]:
    """The parameters that train and are not selected."""
    selected = {id(parameter) for _, parameter in reg.named_parameters()}
    every = (entry.parameter for entry in selection.named_parameters(reg.model))
    return [w for w in every if w.requires_grad and id(w) not in selected]


def _penalties(reg: Regularizer, bindings: Sequence[Binding]) -> list[Penalty]:
    return [binding.penalty if reg.enabled else binding.penalty.scaled(0.0) for binding in bindings]


def _largest(norms: Sequence[float]) -> float:
    """The largest, inf of none; a NaN, which `max` may drop, stays."""
    return math.nan if any(map(math.isnan, norms)) else max(norms, default=math.inf)


def _unit(penalty: Penalty) -> Penalty:
    """`penalty` with its first strength that is not 0 at 1, and the others in proportion."""
    strengths = {name: getattr(penalty, name) for name in penalty.strengths}
    first = next((name for name, value in strengths.items() if value != 0), penalty.strengths[0])
    unit = {name: value / (strengths[first] or 1.0) for name, value in strengths.items()}
    return penalty._with(**{**unit, first: 1.0})


def _evaluate(reg: Regularizer, closure: Closure, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The data loss and its gradients; a parameter that it does not use has zeros."""
    if not callable(closure):
        raise TypeError(
            f"closure is a {type(closure).__name__}; pass a function that computes the data loss: "
            "lambda: criterion(model(x), y)"
        )
    if any(module.training and isinstance(module, _DropoutNd) and module.p > 0 for module in reg.model.modules()):
        warnings.warn(
            "the model is in training mode, in which dropout makes another loss of each call; call model.eval() first",
            stacklevel=3,
        )
    before = [(w.grad, None if w.grad is None else w.grad._version) for w in parameters]
    exchanged = fsdp_parameters(reg.model)
    if exchanged:
        reshard(reg.model)  # whole weights that an evaluation has left there would hide what was placed
    with reg.disabled(), torch.enable_grad():
        loss = closure()
        for w, (grad, version) in zip(parameters, before, strict=True):
            if w.grad is not None and (w.grad is not grad or w.grad._version != version):
                raise ValueError(
                    "the closure changed .grad: it calls backward(), which leaves no graph to certify; return the loss "
                    "alone, or let stationarity(reg) read the .grad that an optimizer's step left"
                )
        if not isinstance(loss, Tensor):
            raise TypeError(f"the closure returned a {type(loss).__name__}; it must return the data loss, a 0-d tensor")
        if loss.dim() != 0 or not loss.is_floating_point():
            raise ValueError(
                f"the closure returned a tensor of shape {tuple(loss.shape)} and {loss.dtype}, and not a real scalar; "
                "reduce it first, as with reduction='mean'"
            )
        if not loss.requires_grad:
            raise ValueError(
                "the closure's loss has no gradient; compute it from the model's parameters, outside torch.no_grad() "
                "and without .item() or .detach()"
            )
        gradients: Sequence[Tensor] = ()
        if parameters and (exchanged or isinstance(reg.model, nn.parallel.DistributedDataParallel)):
            gradients = _exchanged_gradients(reg.model, loss, parameters)
        elif parameters:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return loss.detach(), [gradient.to_dense() for gradient in gradients]


def _exchanged_gradients(model: nn.Module, loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the mean loss of all processes, which come by `backward()` alone; `.grad` stays as it is."""
    every = [entry.parameter for entry in selection.named_parameters(model)]
    before = [w.grad for w in every]
    try:
        for w in every:
            w.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return [torch.zeros_like(w) if w.grad is None else w.grad for w in parameters]
    finally:
        for w, grad in zip(every, before, strict=True):
            w.grad = grad


def _left_behind(reg: Regularizer, bindings: Sequence[Binding], parameters: Sequence[Tensor]) -> list[Tensor]:
    """What `backward()` left in `.grad`, where that is the gradient of the data loss alone."""
    if loose := [binding.name for binding in bindings if binding.carrier is None]:
        raise ValueError(
            f"{', '.join(loose)} may be regularized in the loss, and then .grad holds the penalty's gradient too; pass "
            "a closure that returns the data loss: stationarity(reg, lambda: criterion(model(x), y))"
        )
    if parameters and all(w.grad is None for w in parameters):
        raise ValueError(
            "no parameter has a .grad; call it after loss.backward() and before zero_grad(), or pass a closure that "
            "returns the data loss"
        )
    return read_gradients(parameters)


@contextlib.contextmanager
def _placed(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Other values inside a `with` block; every bit comes back after it."""
    before = [w.detach().clone() for w in parameters]
    try:
        for w, value in zip(parameters, values, strict=True):
            w.data.copy_(value)  # .data: graphs that the caller holds stay valid, as nothing will have changed
        yield
    finally:
        for w, value in zip(parameters, before, strict=True):
            w.data.copy_(value)


# ---------------------------------------------------------------------- the dual


def _exact(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in double precision, on the CPU: not every device has it."""
    return [w.detach().cpu().to(torch.complex128 if w.is_complex() else torch.float64, copy=True) for w in tensors]


def _check_nonnegative(f: float) -> None:
    if f < 0:
        raise ValueError(
            f"the data loss is {f:g}, and the bound needs one that is never negative; add a constant to it, or use "
            "stationarity(reg, closure)"
        )


def _dual_point(penalties: Sequence[Penalty], gradients: Sequence[Tensor]) -> tuple[float, float]:
    """The largest α ≤ 1 for which Ω*(−α·gradient) is finite, and Ω* there."""

    def conjugates(alpha: float) -> list[float]:
        return [p._conjugate(-alpha * g).item() for p, g in zip(penalties, gradients, strict=True)]

    inside = [value < math.inf for value in conjugates(1.0)]
    norms = [p._dual_norm(g).item() for p, g, fine in zip(penalties, gradients, inside, strict=True) if not fine]
    alpha, shrink = min([1.0, *(1 / norm for norm in norms)]), sys.float_info.epsilon
    # 1/norm may round to the outside; at α = 0 every conjugate is finite.
    while (conjugate := math.fsum(conjugates(alpha))) == math.inf:
        alpha, shrink = alpha * (1 - shrink), 2 * shrink
    return alpha, conjugate


def _is_quadratic(
    reg: Regularizer, closure: Closure, parameters: Sequence[Tensor], loss: Tensor, gradients: Sequence[Tensor]
) -> bool:
    """The trapezoidal rule holds between the weights and three points off them, as for quadratics alone."""
    f, ws, gs = loss.item(), _exact(parameters), _exact(gradients)
    squared = total_inner(gs, gs)
    if squared == 0:  # it has underflowed
        return False
    # A half of a precise dtype's digits; half-precision losses are too coarse to tell.
    tolerance = min(1e-3, max(torch.finfo(x.dtype).eps for x in (loss, *parameters)) ** 0.5)
    # Twice straight downhill, and once in a direction of no meaning. Beyond f/‖g‖ the tangent is below 0, where f ≥ 0
    # cannot follow it; at 2f/‖g‖ the rule holds for |w| too, by symmetry about its kink.
    for reach, frequency in [(1.25, 0.0), (1.75, 0.0), (1.5, 1.0)]:
        turned = [g * torch.cos(frequency * torch.arange(g.numel(), device="cpu").reshape(g.shape)) for g in gs]
        goal = [w - reach * f / squared * g for w, g in zip(ws, turned, strict=True)]
        with _placed(parameters, goal):
            other, slopes = _evaluate(reg, closure, parameters)
            steps = [u - w for u, w in zip(_exact(parameters), ws, strict=True)]
        f_other, others = other.item(), _exact(slopes)
        _check_nonnegative(f_other)
        risen = (total_inner(steps, gs) + total_inner(steps, others)) / 2
        size = (
            f
            + f_other
            + math.sqrt(total_inner(steps, steps)) * (math.sqrt(squared) + math.sqrt(total_inner(others, others)))
        )
        if not abs(f_other - f - risen) <= tolerance * size < math.inf:
            return False
    return True
