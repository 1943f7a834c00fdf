"""Walking a regularization path: one fit per λ, each from the weights of the last."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

from torchreg._checks import nonnegative, whole_number
from torchreg.binding.bindings import Binding
from torchreg.binding.regularizer import Regularizer
from torchreg.inspection.certificates import Closure, lambda_max
from torchreg.inspection.zero_counts import sparsity
from torchreg.training.path_points import Keep, PathPoint, RegularizationPath, Score, Stop, Strengths
from torchreg.training.session import Fit, check_regularizer, copied, evaluating, fitting, put_back, rng_states, set_rng


def path(
    regularizer: Regularizer,
    fit: Fit,
    closure: Closure | None = None,
    *,
    lambdas: Iterable[float] | None = None,
    score: Score | None = None,
    stop: Stop | None = None,
    keep: Keep | None = None,
    into: RegularizationPath | None = None,
) -> RegularizationPath:
    """Fits the model of `regularizer` at one λ after the other, each time from the weights of the last: a warm start.

    λ is the first strength of `regularizer` that is not 0; all others move in proportion to it: from
    `ElasticNet(1e-3, 1e-4)` the path keeps l2 = l1/10, as scikit-learn's `enet_path` keeps its `l1_ratio`. The path
    sets the strengths and starts each fit with every `factor` at 1, so a schedule within `fit` may move that.

    The grid is walked as it stands. Down from λ_max, the default, it goes from no weights to many: right for a linear
    model, whose solution at λ_max is known. A network is better walked up, from the dense one down in weights, as
    LassoNet does: neurons that have died do not come back.

    Args:
        regularizer: the penalties, and through them the model.
        fit: `fit(model, regularizer)` trains the model as always, to convergence where it is convex, with an optimizer
            of its own; it need not know of λ. It starts from the weights that are there.
        closure: the data loss, as in `lambda_max`: for the grid, and for `loss` and `objective` of the points.
        lambdas: the grid, of numbers ≥ 0; None is `lambda_grid(reg, fit, closure)`.
        score: `score(model)`, higher is better.
        stop: `stop(path)` is asked after every point, with those so far, and ends the path by returning true:
            `Patience(5)`, or `lambda path: path[-1].sparsity < 0.5`. It is also the place to save a checkpoint.
        keep: `keep(path)` is asked after every point whose weights to keep: `lambda path: [path.best()]`, or
            `lambda path: []` for none. All by default. The last point has its weights always.
        into: a path to add the points to, in place: those that are there when `fit` raises stay in it. One that was
            broken off, or loaded, goes on after its last point, from its weights and the state that torch's random
            generators had: bit for bit as if it had gone through. `lambdas` may then give it a longer grid.
    Returns:
        The path. Model and `regularizer` are left at its last point, after an exception too (before the first point, as
        they were). For `score` and `closure` the model is in evaluation mode.
    Raises:
        TypeError: `regularizer` is not a regularizer, something cannot be called, or the score is not a number.
        ValueError: there is neither a grid nor a closure, a λ is negative or not finite, all strengths are 0,
            `regularizer` is disabled, or `into` is a path of other terms or another grid. Nothing has changed then.
    Source: Friedman, Hastie and Tibshirani, 2010, for the grid and the warm starts; Lemhadri et al., 2021 (LassoNet),
        for the way up.

    >>> x, y = torch.eye(3), torch.tensor([[3.0], [0.6], [-0.3]])
    >>> model = nn.Linear(3, 1, bias=False)
    >>> reg = Regularizer(model, L1(1.0))
    >>> def fit(model, reg):
    ...     optimizer = tr.optim.ProxSGD(model.parameters(), lr=1.5, regularizer=reg)
    ...     for step in range(20):
    ...         optimizer.zero_grad()
    ...         nn.functional.mse_loss(model(x), y).backward()
    ...         optimizer.step()
    >>> print(path(reg, fit, lambda: nn.functional.mse_loss(model(x), y), lambdas=[2.0, 0.4, 0.1]))
      λ    zeros  left  features  penalty  objective
    ---  -------  ----  --------  -------  ---------
      2  100.00%     0         0        0       3.15
    0.4   66.67%     1         1     0.96       1.23
    0.1    0.00%     3         3    0.345     0.3675
    """
    check_regularizer(regularizer)
    if not isinstance(into, RegularizationPath | None):
        raise TypeError(f"into is a {type(into).__name__}; pass a RegularizationPath(), empty or to go on with")
    for name, value in {"fit": fit, "closure": closure, "score": score, "stop": stop, "keep": keep}.items():
        _check_callable(name, value, needed=name == "fit")
    if not regularizer.enabled:
        raise ValueError("regularizer is disabled, so that every λ would give the same model; call reg.enable() first")
    walked = RegularizationPath() if into is None else into
    names, proportions = [name for name, _ in regularizer.named_parameters()], _proportions(regularizer)
    grid = None if lambdas is None else checked_grid(lambdas)
    if walked.lambdas:
        _check_same(walked, names, proportions, grid)
        if walked:
            walked[-1].load_into(regularizer)
        set_rng(walked._rng)
    else:
        if grid is None:
            if closure is None:
                raise ValueError("there is no grid; pass lambdas, or the closure from whose gradients λ_max follows")
            grid = lambda_grid(regularizer, fit, closure)
        walked._names, walked._proportions, walked._rng = names, proportions, rng_states(regularizer.model)
    walked.lambdas = grid or walked.lambdas

    back = (copied(regularizer.model.state_dict()), regularizer.state_dict())
    if walked and stop is not None and stop(walked):
        return walked
    for strength in walked.lambdas[len(walked) :]:
        try:
            _set(regularizer, strength, walked._proportions)
            with fitting(regularizer):
                fit(regularizer.model, regularizer)
            point = _measured(regularizer, strength, closure, score)
        except BaseException:
            regularizer.model.load_state_dict(back[0])
            regularizer.load_state_dict(back[1])
            raise
        assert point.state is not None
        back = point.state, point.strengths
        walked._rng = rng_states(regularizer.model)
        walked._points.append(point)
        if keep is not None:
            kept = {id(one) for one in keep(walked)} | {id(point)}
            walked._points = [
                one if id(one) in kept or one.state is None else dataclasses.replace(one, state=None) for one in walked
            ]
        if stop is not None and stop(walked):
            break
    return walked


def lambda_grid(
    regularizer: Regularizer, fit: Fit, closure: Closure, *, n: int = 100, ratio: float = 1e-3
) -> tuple[float, ...]:
    """`n` values of λ, from λ_max down to ratio·λ_max, each the same factor below the last.

    λ_max is the smallest λ at which all weights that can be zero are zero. It depends on the parameters that train
    without a penalty (the intercept, say). Where there are such, they are fitted first: `fit` is called once or twice
    with the other weights at zero and a λ that keeps them there, and λ_max is rounded up by 10√ε of the weights' dtype.
    Model and `regularizer` are left as they were.

    Args:
        regularizer, fit, closure: as in `path`.
        n: how many, at least 1.
        ratio: the smallest λ over the largest, between 0 and 1.
    Returns:
        λ in the units of `path`: of the first strength of `regularizer` that is not 0.
    Raises:
        TypeError: `regularizer` is not a regularizer, something cannot be called, or `n` or `ratio` is not a number.
        ValueError: `n` or `ratio` is out of range, no term holds a weight at zero, or λ_max is 0 or not finite, as it
            may be for a deep network: at zero weights little has a gradient.
    Source: Friedman, Hastie and Tibshirani, 2010, section 2.5; scikit-learn's `lasso_path` has the same defaults.

    >>> x, y = torch.eye(3), torch.tensor([[3.0], [0.6], [-0.3]])
    >>> model = nn.Linear(3, 1, bias=False)
    >>> reg = Regularizer(model, L1(1.0))
    >>> lambda_grid(reg, print, lambda: nn.functional.mse_loss(model(x), y), n=3, ratio=0.25)  # no intercept to fit
    (2.0, 1.0, 0.5)
    """
    check_regularizer(regularizer)
    whole_number("n", n)
    ratio = nonnegative("ratio", ratio, "it is the smallest λ over the largest, such as 1e-3")
    if not 0 < ratio < 1:
        raise ValueError(f"ratio={ratio!r} must lie between 0 and 1; it is the smallest λ over the largest")
    _check_callable("fit", fit, needed=True)
    largest = _largest(regularizer, fit, closure)
    return tuple(largest * ratio ** (i / max(n - 1, 1)) for i in range(n))


def _largest(regularizer: Regularizer, fit: Fit, closure: Closure) -> float:
    """λ_max of all terms together, with whatever trains without a penalty fitted."""
    largest, held = _lambda_max(regularizer, closure)

    def corner(binding: Binding) -> Tensor:
        w = binding.parameter().detach()
        return torch.zeros_like(w) if binding.anchor is None else binding.anchor.to(w)

    own = {id(binding.parameter()) for binding in held}
    if all(id(w) in own for w in regularizer.model.parameters() if w.requires_grad):
        return largest
    with put_back(regularizer):
        for _ in range(2):  # the first λ_max, of an intercept that is not fitted, may be too small by chance
            for binding in held:
                binding.parameter().data.copy_(corner(binding))
            # A penalty holds them there: frozen weights would leave an optimizer's certificate nothing to compare with.
            _set(regularizer, 10 * largest, _proportions(regularizer))
            with fitting(regularizer):
                fit(regularizer.model, regularizer)
            largest, _ = _lambda_max(regularizer, closure)
            if all(torch.equal(binding.parameter(), corner(binding)) for binding in held):
                break
    # A fit finds an intercept to some √ε, and at a λ_max that is too small by as much a weight would already live.
    precision = max(torch.finfo(binding.parameter().dtype).eps for binding in held)
    return largest * (1 + 10 * math.sqrt(precision))


def _lambda_max(regularizer: Regularizer, closure: Closure) -> tuple[float, list[Binding]]:
    """The smallest λ that holds at zero all weights that a penalty can hold there; and these."""
    with evaluating(regularizer.model):
        found = lambda_max(regularizer, closure)
    firsts = {key: next(filter(None, shares.values()), 0.0) for key, shares in _proportions(regularizer).items()}
    candidates = {key: found[key] / first for key, first in firsts.items() if first and found[key] != math.inf}
    if not candidates:
        raise ValueError(
            f"{regularizer!r} has no term that holds a weight at zero (L2 does not), so there is no λ_max; pass "
            "lambdas, such as [10 ** (-i / 10) for i in range(30)]"
        )
    if not 0 < sum(candidates.values()) < math.inf:  # NaN too
        raise ValueError(
            f"λ_max is {max(candidates.values()):g}: at zero weights the loss has no gradient to weigh λ against, as "
            "in a network of several layers; pass lambdas, from small to large, and walk up from the dense network"
        )
    bindings = [
        b for b in regularizer.bindings() if b.term.key in candidates and b.scale and b.parameter().requires_grad
    ]
    return max(candidates.values()), bindings


# ---------------------------------------------------------------------- one point


def _proportions(regularizer: Regularizer) -> Strengths:
    """Every strength over the first that is not 0, which is λ."""
    strengths = {key: term.strengths for key, term in regularizer.terms.items()}
    first = next((value for values in strengths.values() for value in values.values() if value), None)
    if first is None:
        raise ValueError(
            f"every strength of {regularizer!r} is 0, which leaves no proportion to walk in; write L1(1.0)"
        )
    return {key: {name: value / first for name, value in values.items()} for key, values in strengths.items()}


def _set(regularizer: Regularizer, strength: float, proportions: Strengths) -> None:
    regularizer.load_state_dict(
        {
            key: {**{name: strength * share for name, share in shares.items()}, "factor": 1.0}
            for key, shares in proportions.items()
        }
    )


def _measured(regularizer: Regularizer, strength: float, closure: Closure | None, score: Score | None) -> PathPoint:
    """The point of the path at which the model stands."""
    with evaluating(regularizer.model), torch.no_grad():
        worth = None if score is None else _number("score", score(regularizer.model))
        loss = None
        if closure is not None:
            with regularizer.disabled():
                loss = _number("closure", closure())
        penalty = regularizer().item()
    found = sparsity(regularizer)
    first = found.layers[0]
    return PathPoint(
        strength,
        worth,
        found.fraction,
        found.weights - found.zeros,
        first.inputs - first.dead_inputs,
        penalty,
        loss,
        regularizer.state_dict(),
        copied(regularizer.model.state_dict()),
    )


def _number(name: str, value: object) -> float:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, bool) or not isinstance(number, Real):
        what = f"a tensor of shape {tuple(number.shape)}" if isinstance(number, Tensor) else type(number).__name__
        raise TypeError(f"{name} returned {what}; it must return a number")
    return float(number)


# ---------------------------------------------------------------------- what was given


def checked_grid(lambdas: object) -> tuple[float, ...]:
    """`lambdas` as numbers, or an error."""
    if isinstance(lambdas, str) or not isinstance(lambdas, Iterable):
        raise TypeError(f"lambdas={lambdas!r} is a {type(lambdas).__name__}; pass numbers, such as [1e-2, 1e-3]")
    values = lambdas.tolist() if hasattr(lambdas, "tolist") else lambdas  # of tensors and arrays
    grid = tuple(nonnegative("λ", value, "pass numbers, such as [1e-2, 1e-3]") for value in values)
    if not grid:
        raise ValueError("lambdas is empty; give at least one λ, or None for lambda_grid(reg, fit, closure)")
    return grid


def _check_callable(name: str, value: object, needed: bool) -> None:
    if not callable(value) and (needed or value is not None):
        raise TypeError(f"{name} is a {type(value).__name__}, which cannot be called; pass a function")


def _check_same(
    walked: RegularizationPath, names: Sequence[str], proportions: Strengths, grid: Sequence[float] | None
) -> None:
    """Raises where a path cannot go on as asked."""
    if list(names) != walked._names:
        raise ValueError(
            f"into is a path of {', '.join(walked._names)}, and regularizer selects {', '.join(names)}; pass the "
            "regularizer it was walked with, or a new RegularizationPath()"
        )
    ours, theirs = (
        {(key, name): share for key, shares in found.items() for name, share in shares.items()}
        for found in (proportions, walked._proportions)
    )
    if ours.keys() != theirs.keys() or not all(math.isclose(ours[key], theirs[key]) for key in ours):
        raise ValueError(
            f"into was walked with strengths in the proportions {walked._proportions}, and regularizer has "
            f"{proportions}; pass the regularizer it was walked with, or a new RegularizationPath()"
        )
    done = [point.strength for point in walked]
    if grid is not None and list(grid[: len(done)]) != done:
        raise ValueError(
            f"lambdas does not begin with the {len(done)} λ that into has walked already, {done[0]:g} to {done[-1]:g}; "
            "append the new ones to those, or pass a new RegularizationPath()"
        )
