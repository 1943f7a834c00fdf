"""Certificates: the distance to a stationary point, a bound on what training can still gain, and the λ of all zeros."""

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

from torchreg._distributed import fsdp_parameters, is_sharded, layout_of, reshard, unsharded
from torchreg._tensors import widened
from torchreg.binding import selection
from torchreg.binding.bindings import Binding
from torchreg.binding.regularizer import Regularizer
from torchreg.penalties import Penalty
from torchreg.penalties.base import inner

Closure = Callable[[], Tensor]
"""Returns the data loss at the present weights, a 0-d tensor with a graph. It must not call `backward()`."""


@dataclass(frozen=True, repr=False)
class Stationarity:
    """The distance from −gradient of the data loss to the subgradients of the penalty: 0 at a stationary point.

    Attributes:
        total: the Euclidean distance over all trainable parameters.
        relative: total / max(‖gradient‖, ‖subgradient‖), between 0 and 2 and independent of the scale of the loss. It
            is 1 if there is no penalty and the gradient is not 0, however small the gradient is.
        by_term: the distance over the parameters of each term, by the key of the term.
        unpenalized: ‖gradient‖ over the trainable parameters without a penalty.
    """

    total: float
    relative: float
    by_term: Mapping[str, float]
    unpenalized: float

    def __repr__(self) -> str:
        terms = ", ".join(f"{key!r}: {value:.3g}" for key, value in self.by_term.items())
        return (
            f"Stationarity(total={self.total:.3g}, relative={self.relative:.3g}, "
            f"by_term={{{terms}}}, unpenalized={self.unpenalized:.3g})"
        )


def stationarity(regularizer: Regularizer, closure: Closure | None = None) -> Stationarity:
    """The Euclidean distance from −∇f(w) to ∂Ω(w), with data loss f and penalty Ω, for any network.

    It is 0 if and only if the weights are stationary: for L1, ∇f = −λ·sign(w) at the nonzero weights and |∇f| ≤ λ at
    the zeros. In a convex problem the stationary points are the solutions. Frozen parameters do not count, and while
    the regularizer is disabled its penalties are 0.

    Args:
        regularizer: the regularizer whose penalties are certified.
        closure: a function that returns the data loss on all the data and does not call `backward()`; a `reg()` in it
            counts as 0. No `.grad` changes. Put the model in evaluation mode first: with dropout every call has another
            loss, and batch norm would include this call in its running statistics. Without a closure `.grad` is read,
            as `backward()` of the data loss has set it: call this before `optimizer.step()` moves the weights, and with
            a GradScaler after `scaler.unscale_(optimizer)`.
    Returns:
        The distances as numbers, in total and by term. Reading them waits for the device. Under DDP and `fully_shard`
        the loss is the mean over all processes, and every process has to call this.
    Raises:
        TypeError: `regularizer` is not a Regularizer, or the closure is not callable or does not return a tensor.
        ValueError: the closure's loss is not a scalar with a gradient, or the closure called `backward()`; or, without
            a closure, `.grad` may include the gradient of the penalty, or no parameter has a `.grad`.
        NotImplementedError: a penalty does not define its subgradients.
        RuntimeError: a selected parameter is computed by a parametrization.
    Source: Rockafellar and Wets, 1998, theorem 10.1 (Fermat's rule).

    >>> model = nn.Linear(3, 1)
    >>> reg = Regularizer(model, L1(0.1))
    >>> optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.2, momentum=0.9, regularizer=reg)
    >>> x, y = torch.eye(3), torch.tensor([[3.0], [0.2], [-0.2]])
    >>> for step in range(1000):
    ...     optimizer.zero_grad()
    ...     nn.functional.mse_loss(model(x), y).backward()
    ...     if tr.stationarity(reg).relative <= 1e-5:  # reads .grad
    ...         break
    ...     optimizer.step()
    >>> step < 999
    True
    >>> tr.stationarity(reg, lambda: nn.functional.mse_loss(model(x), y)).relative <= 1e-5
    True
    """
    bindings, unpenalized = _trainable(regularizer), _unpenalized(regularizer)
    parameters = [*(binding.parameter() for binding in bindings), *unpenalized]
    if closure is None:
        gradients = _stored_gradients(regularizer, bindings, parameters)
    else:
        gradients = _evaluate(regularizer, closure, parameters)[1]
    penalties = [*_penalties(regularizer, bindings), *(None for _ in unpenalized)]
    parts = [distances(*part) for part in zip(penalties, parameters, gradients, strict=True)]
    by_term: dict[str, list[float]] = {key: [] for key in regularizer}
    for binding, (distance, _, _) in zip(bindings, parts, strict=False):
        by_term[binding.term.key].append(distance)
    total, relative = gathered(parts)
    return Stationarity(
        total,
        relative,
        {key: math.hypot(*distances) for key, distances in by_term.items()},
        math.hypot(*(distance for distance, _, _ in parts[len(bindings) :])),
    )


def lambda_max(regularizer: Regularizer, closure: Closure) -> dict[str, float]:
    """The smallest λ at which all weights of a term are stationary at zero; its regularization path starts there.

    The weights of all terms are set to zero together (with `toward` to their anchor), the loss is evaluated once, and
    the weights are restored bit for bit. λ_max = max|∇f| for L1, and max‖∇f‖/weight over the groups for the group
    lasso. Parameters without a penalty keep their values: fit them first, with all weights at zero (for example the
    intercept). λ_max is then global for a linear model. For a deep network it is local and often 0, since most
    gradients are 0 at zero weights.

    Args:
        regularizer: the regularizer whose terms are measured; `disabled()` makes no difference.
        closure: a function that returns the data loss, as in `stationarity`.
    Returns:
        By term, λ in units of the term's first strength that is not 0, with its other strengths in proportion and
        `scale` included: with a factor of 1, `reg[key].strength = value` sets exactly this λ. A term whose strengths
        are all 0 counts as if the first one were 1. The value is inf for a term that holds no weight at zero, such as
        L2; its weights keep their values, and so does every parameter with a `scale` of 0.
    Raises:
        TypeError, ValueError, NotImplementedError, RuntimeError: as in `stationarity`; the weights are restored.
    Source: Friedman, Hastie and Tibshirani, 2010, section 2.5.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> reg = Regularizer(model, L1(0.1))
    >>> x, y = torch.eye(3), torch.tensor([[3.0], [0.6], [-0.3]])
    >>> lambda_max(reg, lambda: nn.functional.mse_loss(model(x), y))
    {'l1': 2.0}
    """
    bindings = _trainable(regularizer)
    units = {key: _unit(term.base) for key, term in regularizer.terms.items()}
    penalties = [units[binding.term.key].scaled(binding.scale) for binding in bindings]
    parameters = [binding.parameter() for binding in bindings]
    corners = {
        i: torch.zeros_like(w) if binding.anchor is None else binding.anchor.to(w.dtype)
        for i, (binding, penalty, w) in enumerate(zip(bindings, penalties, parameters, strict=True))
        if penalty.dual_norm(torch.ones(w.shape, dtype=widened(w).dtype, device=w.device)) < math.inf
    }
    with _placed([parameters[i] for i in corners], list(corners.values())):
        gradients = _evaluate(regularizer, closure, parameters)[1]
    norms: dict[str, list[float]] = {key: [] for key in units}
    for i in corners:
        gradient = widened(unsharded(gradients[i]))  # gathers one gradient at a time
        norms[bindings[i].term.key].append(penalties[i].dual_norm(gradient).item())
    return {key: _largest(term_norms) for key, term_norms in norms.items()}


def duality_gap(regularizer: Regularizer, closure: Closure) -> float:
    """An upper bound of (f + Ω)(w) − min(f + Ω), for a data loss f ≥ 0 that is convex in the selected weights.

    For a linear model, more training can lower the objective by at most the gap. It is 0 only at the solution. The
    minimum is over the trainable selected weights; all other parameters keep their values.

    With g = ∇f(w) and the largest α ≤ 1 for which Ω*(−αg) is finite, the gap is

        Ω(w) + Ω*(−αg) + α⟨w, g⟩ + (1 − α)·f(w),

    since f*(αg) ≤ α·f*(g) for a convex f ≥ 0. If f is quadratic, (1 − α)² replaces (1 − α); for the lasso the gap then
    equals scikit-learn's `dual_gap_`. f counts as quadratic if f(u) − f(w) = ½⟨u − w, ∇f(u) + ∇f(w)⟩ holds up to
    rounding at three points u, about as far away as f can decrease; the weights are restored bit for bit.

    Args:
        regularizer: the regularizer whose penalties are certified; while it is disabled Ω = 0.
        closure: a function that returns the data loss, as in `stationarity`. Its convexity is not checked.
    Returns:
        The bound, in units of the loss. Sums are computed in double precision on the CPU; the loss and its gradient
        have the precision of the closure.
    Raises:
        ValueError: a penalty is not convex, the loss is negative though the bound needs f ≥ 0, or a weight is sharded.
        TypeError, NotImplementedError, RuntimeError: as in `stationarity`.
    Source: Boyd and Vandenberghe, 2004, section 5.5; Ndiaye, Fercoq, Gramfort and Salmon, 2017, for the scaling by α.

    >>> model = nn.Linear(3, 1, bias=False)
    >>> reg = Regularizer(model, L1(0.5))
    >>> x, y = torch.eye(3), torch.tensor([[3.0], [0.6], [-0.3]])
    >>> solution = torch.tensor([[2.25, 0.0, 0.0]])  # of MSE + ½Σ|w|: 3 − λ·n/2
    >>> _ = model.load_state_dict({"weight": solution})
    >>> duality_gap(reg, lambda: nn.functional.mse_loss(model(x), y)) < 1e-6
    True
    """
    bindings = _trainable(regularizer)
    for binding in bindings:
        if is_sharded(binding.parameter()):
            raise ValueError(
                f"{binding.name} is sharded, but the gap needs whole weights and the whole loss; use "
                "stationarity(reg, closure), or load the weights into one process"
            )
        if not binding.penalty.convex:
            raise ValueError(
                f"{binding.name} has the penalty {binding.penalty!r}, which is not convex, so there is no dual bound; "
                "use stationarity(reg, closure)"
            )
    penalties = _penalties(regularizer, bindings)
    parameters = [binding.parameter() for binding in bindings]
    loss, gradients = _evaluate(regularizer, closure, parameters)
    f, ws, gs = loss.item(), _exact(parameters), _exact(gradients)
    value = sum(penalty.value(w).item() for penalty, w in zip(penalties, ws, strict=True))
    slope = total_inner(ws, gs)
    if not math.isfinite(f + value + slope):
        return math.nan
    alpha, conjugate = _dual_point(penalties, gs)
    loss_share = 1 - alpha
    if loss_share > 0:
        _check_nonnegative(f)
        if _is_quadratic(regularizer, closure, parameters, loss, gradients):
            loss_share *= loss_share
    return max(0.0, value + conjugate + alpha * slope + loss_share * f)


# ---------------------------------------------------------------------- distances and inner products


def distances(penalty: Penalty | None, w: Tensor, gradient: Tensor) -> tuple[float, float, float]:
    """‖gradient + subgradient‖, ‖gradient‖ and ‖subgradient‖ of one parameter, with one read of the device."""
    w, gradient = widened(w.detach()), widened(gradient)
    layout = layout_of(w)
    w, gradient = layout.part(w), layout.part(gradient)
    if penalty is not None and layout.divided:
        penalty = penalty.on_part(layout)
    subgradient = torch.zeros_like(gradient) if penalty is None else penalty.nearest_subgradient(w, gradient)
    norms = torch.stack([torch.linalg.vector_norm(x) for x in (gradient + subgradient, gradient, subgradient)])
    distance, slope, subslope = (layout.peers.sum(norms.square()).sqrt() if layout.divided else norms).tolist()
    return distance, slope, subslope


def gathered(parts: Iterable[tuple[float, float, float]]) -> tuple[float, float]:
    """The total and the relative distance over several parameters, from the `distances` of each."""
    total, slope, subslope = (math.hypot(*column) for column in zip((0.0, 0.0, 0.0), *parts, strict=True))
    return total, total / max(slope, subslope, sys.float_info.min)  # 0/0 is 0, and NaN stays NaN


def total_inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Re⟨a, b⟩, summed over the tensors of two lists."""
    return math.fsum(inner(x, y).item() for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------- parameters and gradients


def read_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The `.grad` of each parameter; zeros for None."""
    return [torch.zeros_like(w) if w.grad is None else w.grad.to_dense() for w in parameters]


def _trainable(reg: Regularizer) -> list[Binding]:
    """The bindings of the selected parameters that are not frozen."""
    if not isinstance(reg, Regularizer):
        raise TypeError(f"regularizer is a {type(reg).__name__}; build one first: Regularizer(model, L1(1e-4))")
    bindings = reg.bindings()
    for binding in bindings:
        if binding.selected.computed:
            raise RuntimeError(
                f"{binding.name} is computed by a parametrization, so it cannot be certified as a parameter; remove "
                "the parametrization, or exclude it"
            )
    return [binding for binding in bindings if binding.parameter().requires_grad]


def _unpenalized(regularizer: Regularizer) -> list[Tensor]:
    """The trainable parameters that are not selected."""
    selected = {id(parameter) for _, parameter in regularizer.named_parameters()}
    parameters = (entry.parameter for entry in selection.named_parameters(regularizer.model))
    return [w for w in parameters if w.requires_grad and id(w) not in selected]


def _penalties(regularizer: Regularizer, bindings: Sequence[Binding]) -> list[Penalty]:
    return [binding.penalty if regularizer.enabled else binding.penalty.scaled(0.0) for binding in bindings]


def _largest(norms: Sequence[float]) -> float:
    """The largest norm, and inf if there is none. NaN stays NaN, while `max` may drop it."""
    return math.nan if any(map(math.isnan, norms)) else max(norms, default=math.inf)


def _unit(penalty: Penalty) -> Penalty:
    """`penalty`, scaled so that its first strength that is not 0 becomes 1."""
    strengths = {name: getattr(penalty, name) for name in penalty.strengths}
    first = next((name for name, value in strengths.items() if value != 0), penalty.strengths[0])
    unit = {name: value / (strengths[first] or 1.0) for name, value in strengths.items()}
    return penalty.with_strengths(**{**unit, first: 1.0})


def _evaluate(regularizer: Regularizer, closure: Closure, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The data loss and its gradients, which are zeros for a parameter that the loss does not use."""
    model = regularizer.model
    if not callable(closure):
        raise TypeError(
            f"closure is a {type(closure).__name__}; pass a function that computes the data loss: "
            "lambda: criterion(model(x), y)"
        )
    if any(module.training and isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()):
        warnings.warn(
            "the model is in training mode, in which dropout changes the loss at each call; call model.eval() first",
            stacklevel=3,
        )
    before = [(w.grad, None if w.grad is None else w.grad._version) for w in parameters]
    exchanged = fsdp_parameters(model)
    if exchanged:
        reshard(model)  # an earlier evaluation may have kept whole weights, which would hide other values
    with regularizer.disabled(), torch.enable_grad():
        loss = closure()
        for w, (grad, version) in zip(parameters, before, strict=True):
            if w.grad is not None and (w.grad is not grad or w.grad._version != version):
                raise ValueError(
                    "the closure changed .grad: it calls backward(), which frees the graph; return the loss alone, or "
                    "let stationarity(reg) read the .grad that is there"
                )
        if not isinstance(loss, Tensor):
            raise TypeError(f"the closure returned a {type(loss).__name__}; it must return the data loss, a 0-d tensor")
        if loss.dim() != 0 or not loss.is_floating_point():
            raise ValueError(
                f"the closure returned a tensor of shape {tuple(loss.shape)} and {loss.dtype} instead of a real "
                "scalar; reduce it first, for example with reduction='mean'"
            )
        if not loss.requires_grad:
            raise ValueError(
                "the closure's loss has no gradient; compute it from the model's parameters, outside torch.no_grad() "
                "and without .item() or .detach()"
            )
        gradients: Sequence[Tensor] = ()
        if parameters and (exchanged or isinstance(model, nn.parallel.DistributedDataParallel)):
            gradients = _exchanged_gradients(model, loss, parameters)
        elif parameters:
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return loss.detach(), [gradient.to_dense() for gradient in gradients]


def _exchanged_gradients(model: nn.Module, loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the mean loss of all processes, which only `backward()` computes; `.grad` does not change."""
    trained = [entry.parameter for entry in selection.named_parameters(model)]
    before = [w.grad for w in trained]
    try:
        for w in trained:
            w.grad = None
        loss.backward()  # type: ignore[no-untyped-call]
        return [torch.zeros_like(w) if w.grad is None else w.grad for w in parameters]
    finally:
        for w, grad in zip(trained, before, strict=True):
            w.grad = grad


def _stored_gradients(reg: Regularizer, bindings: Sequence[Binding], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients in `.grad`, if they are those of the data loss alone."""
    if loose := [binding.name for binding in bindings if binding.carrier is None]:
        raise ValueError(
            f"{', '.join(loose)} may be regularized in the loss, and then .grad includes the gradient of the penalty; "
            "pass a closure that returns the data loss: stationarity(reg, lambda: criterion(model(x), y))"
        )
    if parameters and all(w.grad is None for w in parameters):
        raise ValueError(
            "no parameter has a .grad; call stationarity after loss.backward() and before zero_grad(), or pass a "
            "closure that returns the data loss"
        )
    return read_gradients(parameters)


@contextlib.contextmanager
def _placed(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Gives the parameters other values inside a `with` block, and restores every bit after it."""
    before = [w.detach().clone() for w in parameters]
    try:
        for w, value in zip(parameters, values, strict=True):
            w.data.copy_(value)  # .data: graphs of the caller stay valid, since the values come back
        yield
    finally:
        for w, value in zip(parameters, before, strict=True):
            w.data.copy_(value)


# ---------------------------------------------------------------------- the dual


def _exact(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies in double precision on the CPU, since not every device supports it."""
    return [w.detach().cpu().to(torch.complex128 if w.is_complex() else torch.float64, copy=True) for w in tensors]


def _check_nonnegative(f: float) -> None:
    if f < 0:
        raise ValueError(
            f"the data loss is {f:g}, but the bound needs a loss that is never negative; add a constant to it, or use "
            "stationarity(reg, closure)"
        )


def _dual_point(penalties: Sequence[Penalty], gradients: Sequence[Tensor]) -> tuple[float, float]:
    """The largest α ≤ 1 for which Ω*(−α·gradient) is finite, and Ω* at this point."""

    def conjugates(alpha: float) -> list[float]:
        return [p.conjugate(-alpha * g).item() for p, g in zip(penalties, gradients, strict=True)]

    inside = [value < math.inf for value in conjugates(1.0)]
    norms = [p.dual_norm(g).item() for p, g, finite in zip(penalties, gradients, inside, strict=True) if not finite]
    alpha, shrink = min([1.0, *(1 / norm for norm in norms)]), sys.float_info.epsilon
    # 1/norm may round to a value that is too large; at α = 0 every conjugate is finite.
    while (conjugate := math.fsum(conjugates(alpha))) == math.inf:
        alpha, shrink = alpha * (1 - shrink), 2 * shrink
    return alpha, conjugate


def _is_quadratic(
    regularizer: Regularizer, closure: Closure, parameters: Sequence[Tensor], loss: Tensor, gradients: Sequence[Tensor]
) -> bool:
    """Whether the trapezoidal rule holds between the weights and three other points, as it does for quadratics only."""
    f, ws, gs = loss.item(), _exact(parameters), _exact(gradients)
    squared = total_inner(gs, gs)
    if squared == 0:  # the square has underflowed
        return False
    # Half of the digits of the dtype; half-precision losses are too coarse to decide.
    tolerance = min(1e-3, max(torch.finfo(x.dtype).eps for x in (loss, *parameters)) ** 0.5)
    # Two points straight downhill, and one in an arbitrary direction. Beyond f/‖g‖ the tangent is below 0, so that an
    # f ≥ 0 cannot be linear; at 2f/‖g‖ the rule would hold for |w| too, by symmetry about its kink.
    for reach, frequency in [(1.25, 0.0), (1.75, 0.0), (1.5, 1.0)]:
        turned = [g * torch.cos(frequency * torch.arange(g.numel(), device="cpu").reshape(g.shape)) for g in gs]
        goal = [w - reach * f / squared * g for w, g in zip(ws, turned, strict=True)]
        with _placed(parameters, goal):
            other, slopes = _evaluate(regularizer, closure, parameters)
            steps = [u - w for u, w in zip(_exact(parameters), ws, strict=True)]
        f_other, others = other.item(), _exact(slopes)
        _check_nonnegative(f_other)
        rise = (total_inner(steps, gs) + total_inner(steps, others)) / 2
        size = (
            f
            + f_other
            + math.sqrt(total_inner(steps, steps)) * (math.sqrt(squared) + math.sqrt(total_inner(others, others)))
        )
        if not abs(f_other - f - rise) <= tolerance * size < math.inf:
            return False
    return True
