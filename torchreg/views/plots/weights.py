"""Plots of weights as they are now: their histogram, the inputs of the first layer, and the masks of nonzeros."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torchreg._checks import whole_number
from torchreg._tables import shape_text
from torchreg._tensors import checked_weights, widened
from torchreg.binding import connectivity, selection
from torchreg.binding.regularizer import Regularizer
from torchreg.binding.selection import ParameterRef, Selector
from torchreg.inspection.zero_counts import counted_weights
from torchreg.views.plots import style
from torchreg.views.weight_maps import input_strengths, mask_pixels, nonzero_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


def weight_histogram(
    source: nn.Module | Regularizer | Tensor,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    bins: int = 60,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Draws the nonzero weights in bins, and the exact zeros as one bar with their number.

    The counts are logarithmic, since there may be a thousand times as many zeros as weights in a bin. No bin holds a
    zero or weights of both signs. Complex weights are drawn by their modulus; weights that are not finite are counted
    in the legend and not drawn.

    Args:
        source: a model, whose weights count as in `torchreg.sparsity`; a regularizer, whose selected parameters count;
            or one weight.
        include, exclude: other weights of the model, or one layer; see `torchreg.select`.
        bins: the approximate number of bins.
        figure: the figure to draw into; a new figure by default.
    Raises:
        TypeError: the source has no weights, or `bins` is not an integer.
        ValueError: there is nothing to count, a selector matches nothing, or `bins` is not positive.
        ImportError: Matplotlib is missing.

    >>> figure = weight_histogram(torch.tensor([[0.0, 0.5], [0.0, -1.0]]))
    >>> [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    ['2 not zero', '50.00% exact zeros: 2 of 4']
    """
    whole_number("bins", bins)
    entries = _entries(source, include, exclude)
    finite, n_zeros, n_weights, n_broken = [], 0, 0, 0
    for entry in entries:
        w = widened(connectivity.weights(entry))
        nonzero = (w.abs() if w.is_complex() else w)[w != 0].cpu()
        finite.append(nonzero[nonzero.isfinite()])
        n_zeros, n_weights = n_zeros + w.numel() - len(nonzero), n_weights + w.numel()
        n_broken += len(nonzero) - len(finite[-1])
    finite = [values for values in finite if len(values)]

    parent = style.canvas(figure, 4.6, 3.1)
    axes = style.only_axes(parent)
    axes.set_yscale("log")
    width, tallest = 0.05, 0
    if not finite:
        axes.set_xlim(-1, 1)
    else:
        width, first, counts = _binned(finite, bins)
        tallest = int(counts.max())
        edges = [(first + i) * width for i in range(len(counts) + 1)]
        axes.stairs(counts.tolist(), edges, fill=True, color=style.BLUE, label=f"{int(counts.sum()):,} not zero")
    if n_zeros:
        label = f"{n_zeros / n_weights:.2%} exact zeros: {n_zeros:,} of {n_weights:,}"
        axes.bar(0, n_zeros, width, color=style.VERMILION, edgecolor="white", linewidth=0.5, zorder=3, label=label)
    if n_broken:
        axes.bar(0, 0, 0, color="none", label=f"{n_broken:,} not finite, not drawn")
    if not n_weights:
        axes.bar(0, 0, 0, color="none", label="no weights")
    axes.set_ylim(0.7, 2 * max(n_zeros, tallest, 5))  # the axis starts below 1, so that a bin of one weight is visible
    # The legend is above the axes, where it covers no bin.
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize="small", frameon=False, borderpad=0)
    axes.set_xlabel("|weight|" if any(e.parameter.is_complex() for e in entries) else "weight", fontsize="small")
    axes.set_ylabel("number of weights", fontsize="small")
    return parent.figure


def _binned(values: Sequence[Tensor], bins: int) -> tuple[float, int, Tensor]:
    """The width of a bin, the index of the first bin, and the counts. Bin i reaches from i·width to (i + 1)·width.

    So 0 is an edge, and no bin has both signs.
    """
    low, high = min(part.min().item() for part in values), max(part.max().item() for part in values)
    width = (high / bins - low / bins) or abs(high) / bins or 1.0
    first, last = math.floor(low / width), math.floor(high / width)
    counts = torch.zeros(last - first + 1, dtype=torch.long, device="cpu")
    for part in values:
        counts += ((part.double() / width).floor() - first).long().bincount(minlength=len(counts))
    return width, first, counts


def input_map(
    source: nn.Module | Regularizer | Tensor,
    shape: Sequence[int] | None = None,
    *,
    name: str | None = None,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Draws how strongly a network reads each input: the norms of the first weight's columns; dead inputs are grey.

    An input is dead if every weight that reads it is exactly 0. Inputs with weights that are not finite are vermilion.

    Args:
        source: a model, a regularizer (the first weight that `torchreg.sparsity` counts there), or one weight.
        shape: the shape of the inputs: (height, width); (channels, height, width) for one image per channel on a common
            scale; or (inputs,) for bars. By default 64, 81, 100, ... inputs of a linear layer are a square image, and
            all others are bars.
        name: the name of another parameter with two or more dimensions.
        figure: the figure to draw into; a new figure by default.
    Raises:
        TypeError: the source has no weights, or the shape does not consist of integers.
        ValueError: there is no such weight, it has no input dimension, or the shape has another number of inputs.
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
    finite, dead = strengths.isfinite(), strengths == 0
    title = f"{count - int(dead.sum())} of {count} inputs live"
    if not isinstance(source, Tensor):
        title = f"{style.plain_label(entry.name)}\n{title}"
    if not bool(finite.all()):
        title += f"\n{int((~finite).sum())} with weights that are not finite"
    note = "grey: dead" if bool(dead.any()) else ""
    if len(shape) == 1:
        parent = style.canvas(figure, 5.0, 2.2)
        _bars(style.only_axes(parent), strengths, title, note)
        return parent.figure

    channels = shape[0] if len(shape) == 3 else 1
    columns = min(channels, 8)
    rows = -(-channels // columns)
    inches = 2.4 if channels <= 3 else 1.1  # many channels, as after a convolution, are small images
    parent = style.canvas(figure, 1.2 + inches * columns, (inches + 0.5) * rows)
    panels = parent.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[channels:]:
        axes.set_axis_off()
    panels = panels[:channels]
    image = _images(panels, strengths.reshape(-1, *shape[-2:]))
    for channel, axes in enumerate(panels):
        number = f"channel {channel}" if channels <= 3 else str(channel)
        axes.set_title(number if channels > 1 else title, fontsize="small")
        axes.set_xlabel(note, fontsize="small")
    if channels > 1:
        parent.suptitle(title, fontsize="small")
    # The colour bar is as high as the last image, which the layout engine alone does not ensure.
    bar = parent.colorbar(image, cax=panels[-1].inset_axes((1.04, 0, 0.06, 1)))
    bar.set_label("norm of its weights", fontsize="small")
    bar.ax.tick_params(labelsize="small")
    return parent.figure


def _bars(axes: Axes, strengths: Tensor, title: str, note: str) -> None:
    """Draws one bar per input."""
    count, finite, dead, top = len(strengths), strengths.isfinite(), strengths == 0, _largest_finite(strengths)
    edges = [i - 0.5 for i in range(count + 1)]
    # `stairs` draws one artist for all inputs, `bar` would draw one per input.
    axes.stairs((top * dead).tolist(), edges, fill=True, color=style.DEAD, label="dead")
    axes.stairs(strengths.where(finite, 0).tolist(), edges, fill=True, color=style.BLUE, label="norm")
    axes.stairs((top * ~finite).tolist(), edges, fill=True, color=style.VERMILION, label="not finite")
    axes.set(xlim=(-0.5, max(count, 1) - 0.5), ylim=(0, 1.05 * top))
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel(f"input ({note})" if note else "input", fontsize="small")
    axes.set_ylabel("norm of its weights", fontsize="small")
    axes.set_title(title, fontsize="small")


def _images(panels: Sequence[Axes], strengths: Tensor) -> object:
    """Draws one image per channel, and returns the last one."""
    from matplotlib import colormaps

    top = _largest_finite(strengths)
    colours = colormaps["viridis"].with_extremes(bad=style.DEAD, over=style.VERMILION)
    # NaN has the colour of dead inputs, and values above the top that of broken ones.
    pixels = strengths.where(strengths.isfinite(), 2 * top).where(strengths != 0, math.nan)
    image: object = None
    for axes, channel in zip(panels, pixels, strict=True):
        image = axes.imshow(channel.numpy(), cmap=colours, vmin=0, vmax=top, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
    return image


def _largest_finite(strengths: Tensor) -> float:
    """The top of the scale; 1 if all inputs are dead, since any scale will do then."""
    finite = strengths[strengths.isfinite()]
    return (finite.max().item() if len(finite) else 0.0) or 1.0


def _input_shape(shape: Sequence[int], count: int, name: str) -> tuple[int, ...]:
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError as error:
        raise TypeError(f"shape={shape!r} is not a shape; pass integers such as (28, 28)") from error
    if not 1 <= len(sizes) <= 3 or min(sizes) < 1 or math.prod(sizes) != count:
        raise ValueError(
            f"shape={sizes} does not hold the {count} inputs of {name}; pass (inputs,), (height, width) or (channels, "
            f"height, width) whose product is {count}, or None"
        )
    return sizes


def masks(
    source: nn.Module | Regularizer | Tensor,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    most: int = 12,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Draws where each weight is nonzero: one image per weight, with neurons as rows and inputs (× kernel) as columns.

    In a weight with more than 256 rows or columns a pixel is a block, and its grey is the share of nonzeros in the
    block: the title gives the size of a block, and the share that black stands for.

    Args:
        source: a model, whose weights count as in `torchreg.sparsity`; a regularizer, whose selected parameters count;
            or one weight.
        include, exclude: other weights of the model, or one layer; see `torchreg.select`.
        most: the largest number of weights to draw; the figure says how many weights it leaves out.
        figure: the figure to draw into; a new figure by default.
    Raises:
        TypeError: the source has no weights, or `most` is not an integer.
        ValueError: there is no weight, a selector matches nothing, or `most` is not positive.
        ImportError: Matplotlib is missing.

    >>> figure = masks(torch.tensor([[1.0, 0.0], [2.0, 3.0]]))
    >>> print(figure.axes[0].get_title())
    weight
    2×2, 75.00% left
    """
    whole_number("most", most)
    entries = _entries(source, include, exclude)
    visible, n_hidden = entries[:most], len(entries[most:])
    matrices = [nonzero_matrix(entry) for entry in visible]
    # An image is at most three times as wide as high, and at most as high as wide, whatever the shape of its weight.
    aspects = [min(max(alive.shape[0] / max(alive.shape[1], 1), 1 / 3), 1.0) for alive in matrices]
    columns = min(len(visible), 4)
    ratios = [max(aspects[i : i + columns]) for i in range(0, len(visible), columns)]

    parent = style.canvas(figure, 0.2 + 1.7 * max(columns, 2), 0.4 + sum(0.5 + 1.6 * ratio for ratio in ratios))
    panels = parent.subplots(len(ratios), columns, squeeze=False, height_ratios=ratios).ravel()
    for axes in panels[len(visible) :]:
        axes.set_axis_off()
    for axes, entry, alive, aspect in zip(panels, visible, matrices, aspects, strict=False):
        pixels = mask_pixels(entry).cpu()
        share = int(alive.sum()) / max(alive.numel(), 1)
        title, darkest = f"{style.plain_label(entry.name)}\n{shape_text(entry.parameter.shape)}, {share:.2%} left", 1.0
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
    note = f"; {n_hidden} more weights are not shown" if n_hidden else ""
    parent.supxlabel(f"rows: neurons; columns: inputs (× kernel){note}", fontsize="small")
    return parent.figure


def _entries(source: object, include: Selector | None = None, exclude: Selector | None = None) -> list[ParameterRef]:
    """The weights of `source`; a tensor becomes the only weight of a new module."""
    if isinstance(source, Tensor):
        if include is not None or exclude is not None:
            raise ValueError("a single weight has nothing to select from; leave include and exclude out")
        holder = nn.Module()
        holder.register_buffer("weight", checked_weights("a plot", source))
        return [ParameterRef("weight", holder, "weight")]
    if not isinstance(source, (nn.Module, Regularizer)):
        raise TypeError(f"expected a model, a Regularizer or a weight, got {type(source).__name__}")
    return counted_weights(source, include, exclude)


def _first(source: nn.Module | Regularizer | Tensor, name: str | None) -> ParameterRef:
    """The first weight of `source` that has inputs, or the parameter of that name."""
    if name is None:
        entries = _entries(source)
        return next((entry for entry in entries if entry.parameter.dim() > 1), entries[0])
    if isinstance(source, Tensor):
        raise ValueError(f"a single weight has no name, so name={name!r} matches nothing; leave it out")
    inventory = selection.Inventory(source.model if isinstance(source, Regularizer) else source)
    return inventory.choose(inventory.resolve(name))[0]
