"""Plots of several trainings: weights against λ, and a score against the number of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchreg._checks import nonnegative
from torchreg.training.path_points import RegularizationPath
from torchreg.views.plots import style
from torchreg.views.plots.arguments import finite_numbers, nonempty_mapping

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from numpy.typing import ArrayLike


def regularization_path(
    lambdas: ArrayLike | Tensor | RegularizationPath,
    weights: ArrayLike | Tensor | Sequence[Tensor] | None = None,
    *,
    names: Sequence[str] | None = None,
    chosen: float | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Draws each weight against λ, which decreases to the right; the upper axis counts the nonzero weights.

    A line starts where its weight leaves zero: there is no line while the weight is exactly 0. The six weights that are
    largest at the smallest λ have colours and labels; the others are grey.

    Args:
        lambdas: the strengths, > 0, in any order; or a path that `torchreg.path` returned.
        weights: one row of weights for each λ. For a path the default is `path.weights()`, its first selected
            parameter; only the points with λ > 0 are drawn.
        names: the names of the weights; w[0], w[1], ... by default.
        chosen: a λ within the path, which a vertical line marks.
        figure: the figure to draw into; a new figure by default.
    Shape:
        lambdas (points,), weights (points, features).
    Raises:
        TypeError: an argument does not hold real numbers, or `names` is not a list of names.
        ValueError: the lengths differ, an argument is empty or not finite, a λ is not positive, or `chosen` is not in
            the path.
        ImportError: Matplotlib is missing.

    Source: Friedman, Hastie and Tibshirani, 2010 (glmnet).

    >>> figure = regularization_path([1.0, 0.1], [[0.0, 0.0], [0.5, 0.0]], names=["age", "sex"])
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['age']
    """
    if isinstance(lambdas, RegularizationPath):
        weights = lambdas.weights() if weights is None else weights
        positive = [i for i, point in enumerate(lambdas) if point.strength > 0]  # a logarithmic axis has no 0
        weights = finite_numbers("weights", weights, (2,))[positive]
        lambdas = [lambdas[i].strength for i in positive]
    elif weights is None:
        raise TypeError("weights is missing; give one row of weights for each λ, or a path that torchreg.path returned")
    grid, path = finite_numbers("lambdas", lambdas, (1,)), finite_numbers("weights", weights, (2,))
    if len(grid) != len(path):
        raise ValueError(
            f"{len(grid)} lambdas and {len(path)} rows of weights do not pair up; give one row of weights for each λ"
        )
    if not bool((grid > 0).all()):
        raise ValueError(
            f"lambdas has the entry {grid.min().item():g}, which cannot be drawn on a logarithmic axis; leave it out"
        )
    labels = [f"w[{i}]" for i in range(path.shape[1])] if names is None else _names(names, path.shape[1])
    largest, smallest = grid.max().item(), grid.min().item()
    if chosen is not None:
        chosen = nonnegative("chosen", chosen, "pass a λ of the path")
        if not smallest * (1 - 1e-6) <= chosen <= largest * (1 + 1e-6):
            raise ValueError(
                f"chosen={chosen:g} lies outside the path, {smallest:g} to {largest:g}; pass a λ in its units and range"
            )

    order = grid.argsort(descending=True)
    grid, path = grid[order], path[order]
    alive = path != 0
    visible = alive.clone()  # a line also includes the zero that it starts from
    visible[1:] |= alive[:-1]
    visible[:-1] |= alive[1:]
    lines = path.where(visible, math.nan)
    ranking = path[-1].abs().argsort(descending=True, stable=True)
    ranking = ranking[alive.any(0)[ranking]]
    leading = [i for i in ranking[: style.MAX_LINES].tolist() if alive[-1, i]]

    parent = style.canvas(figure, 5.5, 3.4)
    axes = style.only_axes(parent)
    axes.axhline(0, color="0.4", linewidth=0.8, zorder=0)
    marker = "o" if len(grid) == 1 else ""  # a line of a single point is not visible without a marker
    others = [i for i in ranking.tolist() if i not in leading]
    if others:
        axes.plot(grid, lines[:, others].numpy(), color="0.75", linewidth=0.7, marker=marker, zorder=1)
    coloured = []
    for i, look in zip(leading, style.styles(), strict=False):
        coloured += axes.plot(grid, lines[:, i], **{**look, "marker": marker}, label=style.shortened(labels[i]))
    if largest == smallest:
        largest, smallest = 2 * largest, smallest / 2
    axes.set(xscale="log", xlim=(largest, smallest))
    axes.set_xlabel("λ", fontsize="small")
    axes.set_ylabel("weight", fontsize="small")
    if chosen is not None:
        _mark(axes, chosen, text_on_the_right=chosen >= math.sqrt(largest * smallest))
    style.label_ends(axes, coloured)

    # The ticks are values of λ on the path, where the counts are exact, and not round numbers between them.
    even = [largest * (smallest / largest) ** (i / 6) for i in range(7)]
    nearest = sorted({int((grid / tick).log().abs().argmin()) for tick in even})
    upper = axes.secondary_xaxis("top")
    upper.set_xticks(grid[nearest].tolist(), [str(int(count)) for count in alive.sum(1)[nearest]])
    upper.set_xticks([], minor=True)
    upper.tick_params(labelsize="small")
    upper.set_xlabel("nonzero weights", fontsize="small")
    return parent.figure


def _mark(axes: Axes, chosen: float, text_on_the_right: bool) -> None:
    """Draws the vertical line of the chosen λ, with its value at the side where the text fits."""
    axes.axvline(chosen, color="0.25", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    axes.annotate(
        f"λ = {chosen:.3g}",
        (chosen, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(4 if text_on_the_right else -4, -3),
        textcoords="offset points",
        ha="left" if text_on_the_right else "right",
        va="top",
        fontsize="small",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )


def _names(names: object, count: int) -> list[str]:
    """`names` as a list of `count` texts, otherwise an error."""
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"names={names!r} is a {type(names).__name__}; pass a list of {count} names")
    labels = list(map(str, names))
    if len(labels) != count:
        raise ValueError(f"{len(labels)} names do not fit {count} weights; give one name per weight, or None")
    return labels


def frontier(
    results: Mapping[str, tuple[ArrayLike | Tensor, ArrayLike | Tensor] | RegularizationPath],
    *,
    reference: Mapping[str, ArrayLike | Tensor] | None = None,
    score: str = "accuracy",
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Draws the score of each method against the weights that remain, from all weights at the left to few at the right.

    With several seeds the line is the median, and the band is the whole range, minimum to maximum. The horizontal axis
    is logarithmic: 98 to 99 % zeros is as far as 99 to 99.5 %, since both halve the remaining weights.

    Args:
        results: (sparsity, score) of each method: shares of exact zeros, 0 ≤ sparsity < 1, and their scores, in any
            unit. A point of several seeds is drawn at their median sparsity. A path that `torchreg.path` returned with
            scores is accepted too; its points without nonzero weights are left out.
        reference: horizontal lines by name: the score of the dense network, or its scores with several seeds.
        score: the label of the score axis.
        figure: the figure to draw into; a new figure by default.
    Shape:
        sparsity and score (points,) or (points, seeds) each; a plain number is one point. A reference () or (seeds,).
    Raises:
        TypeError: an argument does not hold real numbers, or `results` is not a mapping to pairs.
        ValueError: the lengths differ, an argument is empty or not finite, or a sparsity is not in [0, 1).
        ImportError: Matplotlib is missing.

    Source: Blalock et al., 2020, on how such a comparison should be shown.

    >>> figure = frontier({"prox L1": ([0.9, 0.99], [0.98, 0.97])}, reference={"dense": 0.985})
    >>> [line.get_label() for line in figure.axes[0].lines]
    ['prox L1', 'dense']
    """
    curves = {name: _curve(name, pair) for name, pair in nonempty_mapping("results", results).items()}
    levels = {
        name: finite_numbers(f"reference[{name!r}]", value, (0, 1)).reshape(-1)
        for name, value in ({} if reference is None else nonempty_mapping("reference", reference)).items()
    }

    parent = style.canvas(figure, 4.6, 3.2)
    axes = style.only_axes(parent)
    for (name, (percent, scores)), look in zip(curves.items(), style.styles(), strict=False):
        middle, low, high = scores.quantile(0.5, 1), scores.amin(1), scores.amax(1)
        if scores.shape[1] > 1:
            axes.fill_between(percent, low, high, color=look["color"], alpha=0.2, linewidth=0)
            axes.vlines(percent.tolist(), low.tolist(), high.tolist(), color=look["color"], linewidth=0.8)
        dashes = look["linestyle"] if len(percent) > 1 else ""
        axes.plot(percent, middle, **{**look, "linestyle": dashes}, label=name)
    for (name, level), dashes in zip(levels.items(), style.DASHES[1:] * len(levels), strict=False):
        if len(level) > 1:
            axes.axhspan(level.min().item(), level.max().item(), color="0.5", alpha=0.2, linewidth=0, zorder=0)
        axes.axhline(level.quantile(0.5).item(), color="0.35", linewidth=1, linestyle=dashes, label=name, zorder=1)
    _remaining_axis(axes, torch.cat([percent for percent, _ in curves.values()]))
    axes.set_ylabel(score, fontsize="small")
    axes.grid(color="0.9", linewidth=0.6)
    seeds = {*(scores.shape[1] for _, scores in curves.values()), *map(len, levels.values())} - {1}
    title = f"median and range of {' or '.join(map(str, sorted(seeds)))} seeds" if seeds else None
    axes.legend(fontsize="small", title=title, title_fontsize="small", frameon=False, handlelength=3)
    return parent.figure


def _curve(name: str, pair: Any) -> tuple[Tensor, Tensor]:
    """(percent of the weights that remain, scores by seed), from dense to sparse."""
    if isinstance(pair, RegularizationPath):
        if any(point.score is None for point in pair):
            raise ValueError(f"results[{name!r}] is a path without scores; make it with path(..., score=...)")
        points = [point for point in pair if point.left]
        pair = [point.sparsity for point in points], [point.score for point in points]
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"results[{name!r}] is not a pair; give (sparsity, score)")
    sparsity, scores = (
        finite_numbers(f"the {quantity} of {name!r}", values, (0, 1, 2))
        for quantity, values in zip(("sparsity", "score"), pair, strict=True)
    )
    sparsity, scores = (values.reshape(len(values) if values.dim() else 1, -1) for values in (sparsity, scores))
    if len(sparsity) != len(scores):
        raise ValueError(f"{name!r} has {len(sparsity)} sparsities and {len(scores)} scores; give as many of both")
    outside = (sparsity < 0) | (sparsity >= 1)
    if bool(outside.any()):
        value = sparsity[outside][0].item()
        next_move = (
            "leave the point out, since a logarithmic axis has no 0 weights" if value == 1 else "divide percents by 100"
        )
        raise ValueError(f"{name!r} has the sparsity {value:g}, which must be at least 0 and below 1; {next_move}")
    percent = 100 * (1 - sparsity.quantile(0.5, 1))
    order = percent.argsort(descending=True, stable=True)
    return percent[order], scores[order]


def _remaining_axis(axes: Axes, percent: Tensor) -> None:
    """Makes the horizontal axis one of remaining weights, decreasing to the right, with plain numbers at its ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    high, low = percent.max().item(), percent.min().item()
    decades = math.log10(high / low)
    axes.set(xscale="log", xlim=(high * 1.15, low / 1.15))
    logarithmic = LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,))
    axes.xaxis.set_major_locator(MaxNLocator(5) if decades < 0.6 else logarithmic)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("weights left (%)", fontsize="small")
