"""Matplotlib figures for a paper: paths, frontiers, and where in a network the zeros are.

Every function returns a `matplotlib.figure.Figure`: `figure.savefig("path.pdf")` writes it, a notebook shows it. None
goes through pyplot, so nothing is global: figures need no display and no closing, and threads may draw at once. Pass
`figure=`, a part of a page of your own (`page.subfigures(1, 2)[0]`), to draw there instead. Fonts follow
`matplotlib.rcParams`. Series differ in line style and marker as well as in colour (Okabe and Ito, 2008), so that they
survive colour blindness and grey-scale print.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchreg._checks import nonnegative, whole_number
from torchreg._tables import printable, shape_text
from torchreg._tensors import checked_weights, widened
from torchreg.binding import connectivity, selection
from torchreg.binding.regularizer import Regularizer
from torchreg.binding.selection import ParameterRef, Selector
from torchreg.inspection.zero_counts import counted_weights
from torchreg.training.paths import RegularizationPath

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.lines import Line2D
    from numpy.typing import ArrayLike

# Okabe and Ito without the yellow, which white paper swallows; in the order whose neighbours differ most in lightness.
_BLUE, _VERMILION = "#0072B2", "#D55E00"
_COLOURS = ["#000000", _VERMILION, "#56B4E9", "#009E73", "#E69F00", _BLUE, "#CC79A7"]
_MARKERS = ["o", "s", "D", "^", "v", "P", "X"]
_DASHES = ["-", "--", "-.", ":"]
_DEAD = "lightgrey"
_MOST_LINES = 6  # more lines than these nobody tells apart


def regularization_path(
    lambdas: ArrayLike | Tensor | RegularizationPath,
    weights: ArrayLike | Tensor | Sequence[Tensor] | None = None,
    *,
    names: Sequence[str] | None = None,
    chosen: float | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Each weight against λ, which falls to the right; above, how many weights are not zero.

    A line starts where its weight leaves zero: while it is exactly 0 there is none. The six weights that are largest at
    the smallest λ have colours and labels, the others are grey.

    Args:
        lambdas: the strengths, > 0, in any order; or a path that `torchreg.path` walked.
        weights: one row of weights for each of them; of a path `path.weights()`, its first selected parameter, by
            default, of which the points with λ > 0 are drawn.
        names: of the weights; w[0], w[1], ... by default.
        chosen: a λ within the path to mark with a vertical line.
        figure: where to draw; a new figure by default.
    Shape:
        lambdas (points,), weights (points, features).
    Raises:
        TypeError: what is given holds no real numbers, or no names.
        ValueError: the lengths differ, something is empty or not finite, or a λ is not positive or not in the path.
        ImportError: Matplotlib is missing.

    Source: Friedman, Hastie and Tibshirani, 2010 (glmnet).

    >>> figure = regularization_path([1.0, 0.1], [[0.0, 0.0], [0.5, 0.0]], names=["age", "sex"])
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['age']
    """
    if isinstance(lambdas, RegularizationPath):
        weights = lambdas.weights() if weights is None else weights
        shown = [i for i, point in enumerate(lambdas) if point.strength > 0]  # 0 has no place on a logarithmic axis
        weights, lambdas = _numbers("weights", weights, (2,))[shown], [lambdas[i].strength for i in shown]
    elif weights is None:
        raise TypeError("weights is missing; give one row of weights for each λ, or a path that torchreg.path walked")
    grid, path = _numbers("lambdas", lambdas, (1,)), _numbers("weights", weights, (2,))
    if len(grid) != len(path):
        raise ValueError(
            f"{len(grid)} lambdas and {len(path)} rows of weights do not pair up; give one row of weights for each λ"
        )
    if not bool((grid > 0).all()):
        raise ValueError(
            f"lambdas has the entry {grid.min().item():g}, which has no place on a logarithmic axis; leave it out"
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
    beside = alive.clone()  # a line reaches down to the zero that it starts from
    beside[1:] |= alive[:-1]
    beside[:-1] |= alive[1:]
    lines = path.where(beside, math.nan)
    ranked = path[-1].abs().argsort(descending=True, stable=True)
    ranked = ranked[alive.any(0)[ranked]]
    leading = [i for i in ranked[:_MOST_LINES].tolist() if alive[-1, i]]

    parent = _canvas(figure, 5.5, 3.4)
    axes = _axes(parent)
    axes.axhline(0, color="0.4", linewidth=0.8, zorder=0)
    marker = "o" if len(grid) == 1 else ""  # a single point makes no line
    others = [i for i in ranked.tolist() if i not in leading]
    if others:
        axes.plot(grid, lines[:, others].numpy(), color="0.75", linewidth=0.7, marker=marker, zorder=1)
    coloured = []
    for i, style in zip(leading, _styles(), strict=False):
        coloured += axes.plot(grid, lines[:, i], **{**style, "marker": marker}, label=_short(labels[i]))
    if largest == smallest:
        largest, smallest = 2 * largest, smallest / 2
    axes.set(xscale="log", xlim=(largest, smallest))
    axes.set_xlabel("λ", fontsize="small")
    axes.set_ylabel("weight", fontsize="small")
    if chosen is not None:
        axes.axvline(chosen, color="0.25", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
        to_left = chosen < math.sqrt(largest * smallest)  # the text keeps within the axes
        axes.annotate(
            f"λ = {chosen:.3g}",
            (chosen, 1),
            xycoords=axes.get_xaxis_transform(),
            xytext=(-4 if to_left else 4, -3),
            textcoords="offset points",
            ha="right" if to_left else "left",
            va="top",
            fontsize="small",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
    _label_ends(axes, coloured)

    # Counts stand at λs of the path, where they are exact, and not at the round numbers between them.
    wanted = [largest * (smallest / largest) ** (i / 6) for i in range(7)]
    nearest = sorted({int((grid / tick).log().abs().argmin()) for tick in wanted})
    above = axes.secondary_xaxis("top")
    above.set_xticks(grid[nearest].tolist(), [str(int(count)) for count in alive.sum(1)[nearest]])
    above.set_xticks([], minor=True)
    above.tick_params(labelsize="small")
    above.set_xlabel("nonzero weights", fontsize="small")
    return parent.figure


def frontier(
    results: Mapping[str, tuple[ArrayLike | Tensor, ArrayLike | Tensor] | RegularizationPath],
    *,
    reference: Mapping[str, ArrayLike | Tensor] | None = None,
    score: str = "accuracy",
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """The score of each method against the weights it leaves, from all of them at the left to few at the right.

    Over seeds a line is the median and its band the whole range, min to max. The axis of weights left is logarithmic:
    from 98 to 99 % zeros is as far as from 99 to 99.5 %, half of what was left each time.

    Args:
        results: by method, (sparsity, score): shares of exact zeros, 0 ≤ sparsity < 1, and what they score, in any
            unit. A point of several seeds stands at their median sparsity. Or the path that `torchreg.path` walked with
            a score; its points without any weight have no place here.
        reference: horizontal lines, by name: the score of the dense network, or its scores over seeds.
        score: what the score is, the label of its axis.
        figure: where to draw; a new figure by default.
    Shape:
        sparsity and score (points,) or (points, seeds), each; plain numbers are one point. A reference () or (seeds,).
    Raises:
        TypeError: what is given holds no real numbers, or is no mapping to pairs.
        ValueError: the lengths differ, something is empty or not finite, or a sparsity is not in [0, 1).
        ImportError: Matplotlib is missing.

    Source: Blalock et al., 2020, on how such a comparison should be shown.

    >>> figure = frontier({"prox L1": ([0.9, 0.99], [0.98, 0.97])}, reference={"dense": 0.985})
    >>> [line.get_label() for line in figure.axes[0].lines]
    ['prox L1', 'dense']
    """
    curves = {name: _curve(name, pair) for name, pair in _mapping("results", results).items()}
    levels = {
        name: _numbers(f"reference[{name!r}]", value, (0, 1)).reshape(-1)
        for name, value in ({} if reference is None else _mapping("reference", reference)).items()
    }

    parent = _canvas(figure, 4.6, 3.2)
    axes = _axes(parent)
    for (name, (left, scores)), style in zip(curves.items(), _styles(), strict=False):
        middle, low, high = scores.quantile(0.5, 1), scores.amin(1), scores.amax(1)
        if scores.shape[1] > 1:
            axes.fill_between(left, low, high, color=style["color"], alpha=0.2, linewidth=0)
            axes.vlines(left.tolist(), low.tolist(), high.tolist(), color=style["color"], linewidth=0.8)
        dashes = style["linestyle"] if len(left) > 1 else ""
        axes.plot(left, middle, **{**style, "linestyle": dashes}, label=name)
    for (name, level), dashes in zip(levels.items(), _DASHES[1:] * len(levels), strict=False):
        if len(level) > 1:
            axes.axhspan(level.min().item(), level.max().item(), color="0.5", alpha=0.2, linewidth=0, zorder=0)
        axes.axhline(level.quantile(0.5).item(), color="0.35", linewidth=1, linestyle=dashes, label=name, zorder=1)
    _left_axis(axes, torch.cat([left for left, _ in curves.values()]))
    axes.set_ylabel(score, fontsize="small")
    axes.grid(color="0.9", linewidth=0.6)
    seeds = {*(scores.shape[1] for _, scores in curves.values()), *map(len, levels.values())} - {1}
    title = f"median and range of {' or '.join(map(str, sorted(seeds)))} seeds" if seeds else None
    axes.legend(fontsize="small", title=title, title_fontsize="small", frameon=False, handlelength=3)
    return parent.figure


def sparsity_over_time(
    steps: ArrayLike | Tensor,
    measurements: Sequence[Mapping[str, Any]],
    *,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """The share of exact zeros in each layer, and in all, while a network trains.

    Up to six layers are lines with their names at the end. More are the rows of a heat map, under a line of the total:
    with hundreds of layers only every so many rows are named. A line joins the steps at which its layer was measured; a
    row is grey at the others.

    Args:
        steps: when it was measured, increasing.
        measurements: what was measured, a dict each: `sparsity/<parameter name>` for the layers, `overview/sparsity`
            for the total, 0 to 1. Other keys are ignored, so the dicts that go to a log serve as they are.
        figure: where to draw; a new figure by default.
    Shape:
        steps (points,), measurements as many.
    Raises:
        TypeError: a measurement is no mapping, or its sparsity no number.
        ValueError: the lengths differ, no sparsity was measured, one is not in [0, 1], or the steps do not increase.
        ImportError: Matplotlib is missing.

    >>> measured = [{"sparsity/fc1.weight": share, "overview/sparsity": share / 2} for share in (0.0, 0.8)]
    >>> figure = sparsity_over_time([0, 100], measured)
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['total', 'fc1.weight']
    """
    times = _numbers("steps", steps, (1,))
    layers, total = _shares(measurements)
    if len(times) != len(measurements):
        raise ValueError(
            f"{len(times)} steps and {len(measurements)} measurements do not pair up; give one step for each"
        )
    for before, after in itertools.pairwise(times.tolist()):
        if after <= before:
            raise ValueError(f"in steps {after:g} follows {before:g}; give them in order, each once")
    if len(layers) > _MOST_LINES:
        return _heat_map(times, layers, total, figure)

    parent = _canvas(figure, 5.5, 3.2)
    axes = _axes(parent)
    marker = "o" if len(times) == 1 else ""
    curves = {} if total is None else {"total": total}
    curves.update(layers)
    lines = []
    for (name, shares), style in zip(curves.items(), _styles(), strict=False):
        width = 2.2 if shares is total else style["linewidth"]
        known = ~shares.isnan()
        look = {**style, "marker": marker, "linewidth": width}
        lines += axes.plot(times[known], shares[known], **look, label=_plain_text(name))
    axes.margins(x=0)
    axes.set_xlabel("step", fontsize="small")
    _share_axis(axes, "exact zeros")
    _label_ends(axes, lines)
    return parent.figure


def weight_histogram(
    source: nn.Module | Regularizer | Tensor,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    bins: int = 60,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """The weights that are not zero in bins, and the exact zeros beside them as one bar with their number.

    The counts are logarithmic, since the zeros may be a thousand times a bin. No bin mixes signs and none holds a zero.
    Complex weights are drawn by their modulus; weights that are not finite are counted and left out.

    Args:
        source: a model, whose weights count as in `torchreg.sparsity`; a regularizer, whose selected parameters count;
            or one weight.
        include, exclude: other weights of the model, or one layer; see `torchreg.select`.
        bins: about how many bins.
        figure: where to draw; a new figure by default.
    Raises:
        TypeError: the source has no weights, or `bins` is no integer.
        ValueError: there is nothing to count, a selector matches nothing, or `bins` is not positive.
        ImportError: Matplotlib is missing.

    >>> figure = weight_histogram(torch.tensor([[0.0, 0.5], [0.0, -1.0]]))
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['2 not zero', '50.00% exact zeros: 2 of 4']
    """
    whole_number("bins", bins)
    entries = _entries(source, include, exclude)
    finite, zeros, total, strange = [], 0, 0, 0
    for entry in entries:
        w = widened(connectivity.weights(entry))
        alive = w != 0
        left = (w.abs() if w.is_complex() else w)[alive].cpu()
        finite.append(left[left.isfinite()])
        zeros, total = zeros + w.numel() - len(left), total + w.numel()
        strange += len(left) - len(finite[-1])
    finite = [values for values in finite if len(values)]

    parent = _canvas(figure, 4.6, 3.1)
    axes = _axes(parent)
    axes.set_yscale("log")
    width, tallest = 0.05, 0
    if not finite:
        axes.set_xlim(-1, 1)
    else:
        low, high = min(values.min().item() for values in finite), max(values.max().item() for values in finite)
        width = (high / bins - low / bins) or abs(high) / bins or 1.0
        # Bins are whole multiples of the width: 0 is an edge, and no bin has both signs.
        first, last = math.floor(low / width), math.floor(high / width)
        counts = torch.zeros(last - first + 1, dtype=torch.long, device="cpu")
        for values in finite:
            counts += ((values.double() / width).floor() - first).long().bincount(minlength=len(counts))
        tallest = int(counts.max())
        edges = [(first + i) * width for i in range(len(counts) + 1)]
        axes.stairs(counts.tolist(), edges, fill=True, color=_BLUE, label=f"{int(counts.sum()):,} not zero")
    if zeros:
        said = f"{zeros / total:.2%} exact zeros: {zeros:,} of {total:,}"
        axes.bar(0, zeros, width, color=_VERMILION, edgecolor="white", linewidth=0.5, zorder=3, label=said)
    if strange:
        axes.bar(0, 0, 0, color="none", label=f"{strange:,} not finite, not drawn")
    if not total:
        axes.bar(0, 0, 0, color="none", label="no weights")
    axes.set_ylim(0.7, 2 * max(zeros, tallest, 5))  # from below 1: a bin of one weight is seen
    # Above the axes, where no bin is.
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize="small", frameon=False, borderpad=0)
    axes.set_xlabel("|weight|" if any(e.parameter.is_complex() for e in entries) else "weight", fontsize="small")
    axes.set_ylabel("number of weights", fontsize="small")
    return parent.figure


def input_map(
    source: nn.Module | Regularizer | Tensor,
    shape: Sequence[int] | None = None,
    *,
    name: str | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """How strongly a network reads each of its inputs: the norms of the first weight's columns, dead inputs light grey.

    An input is dead if every weight that reads it is exactly 0. Weights that are not finite are vermilion.

    Args:
        source: a model, a regularizer (the first weight that `torchreg.sparsity` counts there), or one weight.
        shape: of the inputs: (height, width), or (channels, height, width) for one image a channel on one scale, or
            (inputs,) for bars. By default a linear layer's 64, 81, 100, ... inputs are a square image, all else bars.
        name: of another parameter with two or more dimensions.
        figure: where to draw; a new figure by default.
    Raises:
        TypeError: the source has no weights, or the shape no integers.
        ValueError: there is no such weight, it has no input dimension, or another number of inputs than the shape.
        ImportError: Matplotlib is missing.

    >>> figure = input_map(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))
    >>> figure.axes[0].get_title()
    '1 of 2 inputs live'
    """
    entry = _first(source, name)
    strengths = input_strengths(entry).cpu().double()
    count = len(strengths)
    side = math.isqrt(count)
    if shape is None:
        linear = not isinstance(entry.owner, nn.modules.conv._ConvNd) and entry.parameter.dim() == 2
        shape = (side, side) if linear and side >= 8 and side * side == count else (count,)
    shape = _input_shape(shape, count, entry.name)
    finite = strengths.isfinite()
    top = strengths[finite].max().item() if bool(finite.any()) else 0.0
    top = top or 1.0  # all dead: any scale will do
    dead = strengths == 0
    title = f"{count - int(dead.sum())} of {count} inputs live"
    if not isinstance(source, Tensor):
        title = f"{_plain_text(entry.name)}\n{title}"
    if not bool(finite.all()):
        title += f"\n{int((~finite).sum())} with weights that are not finite"

    note = "grey: dead" if bool(dead.any()) else ""

    channels = shape[0] if len(shape) == 3 else 1
    across = min(channels, 8)
    down = -(-channels // across)
    wide = 2.4 if channels <= 3 else 1.1  # of many channels, as behind a convolution, small ones
    parent = _canvas(figure, *((5.0, 2.2) if len(shape) == 1 else (1.2 + wide * across, (wide + 0.5) * down)))
    if len(shape) == 1:
        axes = _axes(parent)
        edges = [i - 0.5 for i in range(count + 1)]
        # One artist each, where `bar` would make one an input.
        axes.stairs((top * dead).tolist(), edges, fill=True, color=_DEAD, label="dead")
        axes.stairs(strengths.where(finite, 0).tolist(), edges, fill=True, color=_BLUE, label="norm")
        axes.stairs((top * ~finite).tolist(), edges, fill=True, color=_VERMILION, label="not finite")
        axes.set(xlim=(-0.5, max(count, 1) - 0.5), ylim=(0, 1.05 * top))
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel(f"input ({note})" if note else "input", fontsize="small")
        axes.set_ylabel("norm of its weights", fontsize="small")
        axes.set_title(title, fontsize="small")
        return parent.figure

    from matplotlib import colormaps

    colours = colormaps["viridis"].with_extremes(bad=_DEAD, over=_VERMILION)
    shown = strengths.where(finite, 2 * top).where(~dead, math.nan).reshape(-1, *shape[-2:])
    panels = parent.subplots(down, across, squeeze=False).ravel()
    for axes in panels[channels:]:
        axes.set_axis_off()
    panels = panels[:channels]
    for channel, (axes, pixels) in enumerate(zip(panels, shown, strict=True)):
        image = axes.imshow(pixels.numpy(), cmap=colours, vmin=0, vmax=top, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        name = f"channel {channel}" if channels <= 3 else str(channel)
        axes.set_title(name if channels > 1 else title, fontsize="small")
        axes.set_xlabel(note, fontsize="small")
    if channels > 1:
        parent.suptitle(title, fontsize="small")
    # Beside the last image and as high as it is, which the layout alone does not see to.
    bar = parent.colorbar(image, cax=panels[-1].inset_axes((1.04, 0, 0.06, 1)))
    bar.set_label("norm of its weights", fontsize="small")
    bar.ax.tick_params(labelsize="small")
    return parent.figure


def masks(
    source: nn.Module | Regularizer | Tensor,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    most: int = 12,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Which entries of each weight are not zero: an image a weight, neurons down, inputs (by kernel) across.

    Of a weight with more than 256 rows or columns a pixel is a block, and its grey the share of nonzeros in it: the
    title says how large a block is, and what share black stands for.

    Args:
        source: a model, whose weights count as in `torchreg.sparsity`; a regularizer, whose selected parameters count;
            or one weight.
        include, exclude: other weights of the model, or one layer; see `torchreg.select`.
        most: how many weights to show; the figure says how many it leaves out.
        figure: where to draw; a new figure by default.
    Raises:
        TypeError: the source has no weights, or `most` is no integer.
        ValueError: there is no weight, a selector matches nothing, or `most` is not positive.
        ImportError: Matplotlib is missing.

    >>> figure = masks(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
    >>> print(figure.axes[0].get_title())
    weight
    2×2, 75.00% left
    """
    whole_number("most", most)
    entries = _entries(source, include, exclude)
    shown, hidden = entries[:most], entries[most:]
    matrices = [_matrix(connectivity.nonzero(entry), entry.owner) for entry in shown]
    # Strips thinner than 1 : 3 are drawn thicker than they are, and towers as squares.
    aspects = [min(max(alive.shape[0] / max(alive.shape[1], 1), 1 / 3), 1.0) for alive in matrices]
    columns = min(len(shown), 4)
    ratios = [max(aspects[i : i + columns]) for i in range(0, len(shown), columns)]

    parent = _canvas(figure, 0.2 + 1.7 * max(columns, 2), 0.4 + sum(0.5 + 1.6 * ratio for ratio in ratios))
    panels = parent.subplots(len(ratios), columns, squeeze=False, height_ratios=ratios).ravel()
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    for axes, entry, alive, aspect in zip(panels, shown, matrices, aspects, strict=False):
        pixels = mask_pixels(entry).cpu()
        share = int(alive.sum()) / max(alive.numel(), 1)
        title, darkest = f"{_plain_text(entry.name)}\n{shape_text(entry.parameter.shape)}, {share:.2%} left", 1.0
        if pixels.shape != alive.shape:
            block = [-(-long // short) for long, short in zip(alive.shape, pixels.shape, strict=True)]
            darkest = pixels.max().item() or 1.0
            title += f"\nblack: {darkest:.0%} of a {shape_text(block)} block"
        if alive.numel():
            axes.imshow(pixels.numpy(), cmap="gray_r", vmin=0, vmax=darkest, aspect="auto")
        axes.set_box_aspect(aspect)
        axes.set_anchor("N")
        axes.set(xticks=[], yticks=[])
        axes.set_title(title, fontsize="x-small")
    note = f"; {len(hidden)} more weights are not shown" if hidden else ""
    parent.supxlabel(f"rows: neurons; columns: inputs (× kernel){note}", fontsize="small")
    return parent.figure


# ---------------------------------------------------------------------- of one weight, without Matplotlib


def input_strengths(entry: ParameterRef) -> Tensor:
    """The norm ‖w_j‖₂ of all weights that read input j; 0 if and only if all of them are 0.

    Args:
        entry: of `torchreg.select`. What torch.nn.utils.prune masks counts as 0.
    Returns:
        (inputs,): features of a linear layer, channels of a convolution (grouped and transposed ones too), on the
        weight's device, in float32 or wider. Nothing is read by the host.
    Raises:
        ValueError: the parameter has fewer than two dimensions, and so no inputs.

    >>> net = nn.Linear(3, 2)
    >>> with torch.no_grad():
    ...     _ = net.weight.copy_(torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]]))
    >>> input_strengths(tr.select(net)[0])
    tensor([5., 0., 1.])
    """
    w = widened(connectivity.weights(entry))
    if w.dim() < 2:
        raise ValueError(
            f"{entry.name} has shape {tuple(w.shape)} and so no inputs; name a weight with two or more dimensions"
        )
    size = connectivity.by_input(w.abs(), entry.owner)
    size = size.transpose(1, 2).flatten(0, 1).flatten(1)  # (inputs, what reads them)
    if not size.numel():
        return size.new_zeros(len(size))
    # Squares of small weights would vanish in float32, and a live input pass for dead.
    peak = size.amax(1)
    scale = peak.where(peak > 0, 1)
    return scale * torch.linalg.vector_norm(size / scale[:, None], dim=1)


def mask_pixels(entry: ParameterRef, side: int = 256) -> Tensor:
    """Which entries of a weight are not 0, as an image: neurons down, inputs (by kernel) across.

    Args:
        entry: of `torchreg.select`.
        side: the most pixels down and across. Where there are more entries, a pixel is the share of nonzeros in a
            block of them; blocks do not overlap, and those at the end may be smaller.
    Returns:
        (height, width), at most (side, side), in [0, 1], float32, on the weight's device. A vector is one column.

    >>> net = nn.Linear(4, 2)
    >>> with torch.no_grad():
    ...     _ = net.weight.copy_(torch.tensor([[3.0, 0.0, 1.0, 0.0], [4.0, 5.0, 0.0, 0.0]]))
    >>> mask_pixels(tr.select(net)[0], side=2)
    tensor([[0.5000, 0.5000],
            [1.0000, 0.0000]])
    """
    pixels = _matrix(connectivity.nonzero(entry), entry.owner).float()
    block = [max(1, -(-length // side)) for length in pixels.shape]
    if not pixels.numel() or block == [1, 1]:
        return pixels
    # ceil_mode keeps the ragged blocks at the end, and divides by what they hold.
    return nn.functional.avg_pool2d(pixels[None], block, ceil_mode=True)[0]


def _matrix(w: Tensor, owner: nn.Module) -> Tensor:
    """A weight in two dimensions: (neurons, inputs × kernel)."""
    w = connectivity.by_input(w, owner)
    return w.reshape(w.shape[0] * w.shape[1], math.prod(w.shape[2:]))


# ---------------------------------------------------------------------- what is given


def _entries(source: object, include: Selector | None = None, exclude: Selector | None = None) -> list[ParameterRef]:
    """The weights that `source` means; a tensor is the only weight of a module that holds nothing else."""
    if isinstance(source, Tensor):
        if include is not None or exclude is not None:
            raise ValueError("a single weight has nothing to select from; leave include and exclude out")
        holder = nn.Module()
        holder.register_buffer("weight", checked_weights("a plot", source))
        return [ParameterRef("weight", holder, "weight")]
    if not isinstance(source, (nn.Module, Regularizer)):
        raise TypeError(f"expected a model, a Regularizer or a weight, got {type(source).__name__}; pass one of these")
    return counted_weights(source, include, exclude)


def _first(source: nn.Module | Regularizer | Tensor, name: str | None) -> ParameterRef:
    """The first weight of `source` that has inputs, or the parameter of that name."""
    if name is None:
        entries = _entries(source)
        return next((entry for entry in entries if entry.parameter.dim() > 1), entries[0])
    if isinstance(source, Tensor):
        raise ValueError(f"a single weight has no name, so name={name!r} finds nothing; leave it out")
    inventory = selection.Inventory(source.model if isinstance(source, Regularizer) else source)
    return inventory.choose(inventory.resolve(name))[0]


def _numbers(name: str, values: Any, dims: tuple[int, ...]) -> Tensor:
    """`values` as finite float64 on the CPU in one of `dims` numbers of dimensions; lists may hold tensors."""
    if not isinstance(values, Tensor):
        try:
            values = torch.tensor(_listed(values), dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            kind = ValueError if isinstance(error, ValueError) else TypeError
            raise kind(f"{name} is no array of real numbers ({error}); pass an array, a tensor or lists") from error
    if values.is_complex():
        raise TypeError(f"{name} is complex, and a plot has no axis for it; pass its modulus, .abs()")
    numbers = values.detach().cpu().double()
    if numbers.dim() not in dims or not numbers.numel():
        wanted = " or ".join(map(str, dims))
        raise ValueError(
            f"{name} has shape {tuple(numbers.shape)}, where {wanted} dimensions and at least one number are needed; "
            "see the shapes in the docstring"
        )
    if not bool(numbers.isfinite().all()):
        strange = int((~numbers.isfinite()).sum())
        raise ValueError(f"{name} has {strange} of {numbers.numel()} numbers that are not finite; leave these out")
    return numbers


def _listed(values: Any) -> Any:
    """Arrays and tensors as lists, inside of lists too: then strides and byte orders foreign to torch do not matter."""
    if hasattr(values, "tolist"):
        return values.tolist()
    if isinstance(values, str):  # as csv.DictReader gives numbers
        with contextlib.suppress(ValueError):
            return float(values)
    return [_listed(value) for value in values] if isinstance(values, (list, tuple)) else values


def _mapping(name: str, values: object) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise TypeError(f"{name} is a {type(values).__name__}; pass a dict from the name in the legend to the numbers")
    if not values:
        raise ValueError(f"{name} is empty; give at least one entry")
    return values


def _curve(name: str, pair: Any) -> tuple[Tensor, Tensor]:
    """(percent of weights left, scores by seed), from dense to sparse."""
    if isinstance(pair, RegularizationPath):
        if any(point.score is None for point in pair):
            raise ValueError(f"results[{name!r}] is a path without scores; walk it with path(..., score=...)")
        drawn = [point for point in pair if point.left]
        pair = [point.sparsity for point in drawn], [point.score for point in drawn]
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"results[{name!r}] is no pair; give (sparsity, score)")
    sparsity, scores = (
        _numbers(f"the {what} of {name!r}", values, (0, 1, 2))
        for what, values in zip(("sparsity", "score"), pair, strict=True)
    )
    sparsity, scores = (values.reshape(len(values) if values.dim() else 1, -1) for values in (sparsity, scores))
    if len(sparsity) != len(scores):
        raise ValueError(f"{name!r} has {len(sparsity)} sparsities and {len(scores)} scores; give as many of both")
    if not bool(((sparsity >= 0) & (sparsity < 1)).all()):
        wrong = sparsity[(sparsity < 0) | (sparsity >= 1)][0].item()
        move = (
            "leave the point out: none left has no place on a logarithmic axis"
            if wrong == 1
            else "divide percents by 100"
        )
        raise ValueError(f"{name!r} has the sparsity {wrong:g}, which must be at least 0 and below 1; {move}")
    left = 100 * (1 - sparsity.quantile(0.5, 1))
    order = left.argsort(descending=True, stable=True)
    return left[order], scores[order]


def _shares(measurements: object) -> tuple[dict[str, Tensor], Tensor | None]:
    """The sparsity over time of each layer, and of all; NaN where it was not measured."""
    if not isinstance(measurements, Sequence) or not all(isinstance(one, Mapping) for one in measurements):
        raise TypeError(
            f"measurements must be a list of dicts, one a step, got {type(measurements).__name__}; pass that"
        )
    keys = dict.fromkeys(key for one in measurements for key in one if isinstance(key, str))
    shares = {key: _share_of(key, measurements) for key in keys if key.startswith("sparsity/")}
    total = _share_of("overview/sparsity", measurements) if "overview/sparsity" in keys else None
    if not shares and total is None:
        raise ValueError(
            f"no sparsity was measured among {list(keys)[:5]}; its keys are sparsity/<name> and overview/sparsity"
        )
    return {key.removeprefix("sparsity/"): values for key, values in shares.items()}, total


def _share_of(key: str, measurements: Sequence[Mapping[str, Any]]) -> Tensor:
    values = []
    for one in measurements:
        try:
            value = float(one.get(key, math.nan))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{key} is {one[key]!r}, not a number; measure a share, 0 to 1") from error
        if value < 0 or value > 1:
            raise ValueError(f"{key} is {value:g}, and a share lies between 0 and 1; divide percents by 100")
        values.append(value)
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _names(names: object, count: int) -> list[str]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"names={names!r} is a {type(names).__name__}; pass a list of {count} names")
    labels = list(map(str, names))
    if len(labels) != count:
        raise ValueError(f"{len(labels)} names do not fit {count} weights; give one a weight, or None")
    return labels


def _input_shape(shape: Sequence[int], count: int, name: str) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError as error:
        raise TypeError(f"shape={shape!r} is no shape; pass integers such as (28, 28)") from error
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1 or math.prod(sizes) != count:
        raise ValueError(
            f"shape={sizes} does not hold the {count} inputs of {name}; pass (inputs,), (height, width) or (channels, "
            f"height, width) whose product is {count}, or None"
        )
    return sizes


# ---------------------------------------------------------------------- how it is drawn


def _canvas(figure: Any, width: float, height: float) -> Any:
    """`figure`, or a new one of that size in inches."""
    try:
        from matplotlib.figure import Figure, FigureBase
    except ImportError as error:
        raise ImportError(
            "torchreg.plots draws with Matplotlib, which is missing; in the checkout: pip install '.[plots]'"
        ) from error
    if figure is None:
        figure = Figure(figsize=(width, height), layout="constrained")
        # A notebook shows figures by itself only where pyplot is at work; it asks everything else for this.
        vars(figure)["_repr_png_"] = functools.partial(_png, figure)
    elif not isinstance(figure, FigureBase):
        raise TypeError(f"figure is a {type(figure).__name__}; pass a matplotlib Figure or one of its subfigures(1, 2)")
    return figure


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _axes(parent: Any) -> Axes:
    axes: Axes = parent.subplots()
    _plain(axes)
    return axes


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize="small")


def _styles() -> Iterator[dict[str, Any]]:
    """Colour, line style and marker of one series after the other, without end."""
    for i in itertools.count():
        yield {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": _DASHES[i % len(_DASHES)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "markersize": 5,
            "linewidth": 1.4,
        }


def _left_axis(axes: Axes, left: Tensor) -> None:
    """Percents of weights left, falling to the right on a logarithmic axis, with plain numbers at its ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    high, low = left.max().item(), left.min().item()
    decades = math.log10(high / low)
    axes.set(xscale="log", xlim=(high * 1.15, low / 1.15))
    few = LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,))
    axes.xaxis.set_major_locator(MaxNLocator(5) if decades < 0.6 else few)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("weights left (%)", fontsize="small")


def _share_axis(axes: Axes, label: str) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel(label, fontsize="small")
    axes.grid(color="0.9", linewidth=0.6)


def _heat_map(times: Tensor, layers: Mapping[str, Tensor], total: Tensor | None, figure: Any) -> Figure:
    from matplotlib import colormaps
    from matplotlib.ticker import PercentFormatter

    count = len(layers)
    parent = _canvas(figure, 6.0, 2 + min(0.14 * count, 5.5))
    if total is None:
        lower = parent.subplots()
    else:
        upper, lower = parent.subplots(2, 1, sharex=True, height_ratios=[1, 4])
        _plain(upper)
        upper.plot(times, total, color="black", linewidth=1.8, marker="o" if len(times) == 1 else "", label="total")
        _share_axis(upper, "total")
    middles = (times[1:] + times[:-1]) / 2
    # A measurement's cell reaches halfway to its neighbours, and as far on the other side at the ends.
    ends = (
        (2 * times[:1] - middles[:1], 2 * times[-1:] - middles[-1:]) if len(times) > 1 else (times - 0.5, times + 0.5)
    )
    edges = torch.cat([ends[0], middles, ends[1]])
    mesh = lower.pcolormesh(
        edges.numpy(),
        range(count + 1),
        torch.stack(list(layers.values())).numpy(),
        cmap=colormaps["viridis"].with_extremes(bad=_DEAD),
        vmin=0,
        vmax=1,
        rasterized=True,  # a PDF of hundreds of thousands of cells opens in no reader
    )
    pattern, names = _without_common(list(layers))
    every = math.ceil(count / max(1, (_inches(parent) - 0.7) * (0.95 if total is None else 0.75) / 0.12))
    lower.set_yticks([i + 0.5 for i in range(0, count, every)], [_plain_text(name) for name in names[::every]])
    lower.tick_params(axis="y", labelsize="x-small", length=0)
    lower.tick_params(axis="x", labelsize="small")
    lower.invert_yaxis()
    lower.set_xlabel("step", fontsize="small")
    lower.set_ylabel(
        _plain_text(pattern, 50) + (f"\n{count} rows, 1 in {every} named" if every > 1 else ""), fontsize="small"
    )
    bar = parent.colorbar(mesh, ax=lower, format=PercentFormatter(1))
    bar.set_label("exact zeros", fontsize="small")
    bar.ax.tick_params(labelsize="small")
    return parent.figure


def _label_ends(axes: Axes, lines: Sequence[Line2D]) -> None:
    """The label of each line beside its end, as near as the others allow."""
    ends = []
    for line in lines:
        heights = torch.as_tensor(line.get_ydata(), dtype=torch.float64, device="cpu")
        if len(heights := heights[~heights.isnan()]):
            ends.append((heights[-1].item(), line))
    ends.sort(key=lambda end: end[0])
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)  # the places are in its units
    gap = 0.16 / (0.75 * _inches(axes.figure)) * (high - low)
    for place, (height, line) in zip(_apart([height for height, _ in ends], gap, low, high), ends, strict=True):
        axes.annotate(
            str(line.get_label()),
            (1, height),
            xycoords=axes.get_yaxis_transform(),
            xytext=(1.05, place),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize="small",
            arrowprops={
                "arrowstyle": "-",
                "color": line.get_color(),
                "relpos": (0, 0.5),  # to the text's left edge, not across it
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The nearest places in least squares, of ascending `places`, that are `gap` apart and within low to high.

    Less i·gap it is isotonic regression: neighbours that come too near are pooled, and bounds clip what comes out.
    """
    pools: list[tuple[float, int]] = []
    for i, place in enumerate(places):
        mean, size = place - i * gap, 1
        while pools and pools[-1][0] > mean:
            before, more = pools.pop()
            mean, size = (before * more + mean * size) / (more + size), more + size
        pools.append((mean, size))
    levels = [mean for mean, size in pools for _ in range(size)]
    return [max(low, min(level, high - (len(levels) - 1) * gap)) + i * gap for i, level in enumerate(levels)]


def _inches(parent: Any) -> float:
    return float(parent.bbox.height / parent.figure.dpi)


def _without_common(names: Sequence[str]) -> tuple[str, list[str]]:
    """What dotted names share at their ends, as a pattern ("layers.*.weight"), and what is left of each."""
    parts = [name.split(".") for name in names]
    most = min(map(len, parts)) - 1  # something is left of the shortest
    first = next((i for i in range(most) if len({own[i] for own in parts}) > 1), most)
    last = next((i for i in range(most - first) if len({own[-1 - i] for own in parts}) > 1), most - first)
    pattern = ".".join([*parts[0][:first], "*", *parts[0][len(parts[0]) - last :]])
    return "layer" if pattern == "*" else pattern, [".".join(own[first : len(own) - last]) for own in parts]


def _plain_text(name: str, most: int = 32) -> str:
    """The name of a parameter as it is written: a $ in it begins no formula, a control character does nothing."""
    return _short(printable(name, len(name)), most).replace("$", r"\$")


def _short(name: str, most: int = 32) -> str:
    """A long name without its middle: layers differ at both ends."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most // 2) :]}"
