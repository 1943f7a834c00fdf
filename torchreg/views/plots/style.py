"""The look that all plots share: figures, axes, colours, line styles and labels."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from torchreg._tables import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

BLUE, VERMILION = "#0072B2", "#D55E00"
DEAD = "lightgrey"  # inputs and rows without data
DASHES = ["-", "--", "-.", ":"]
MAX_LINES = 6  # a reader cannot tell more lines apart
# Okabe and Ito's colours without the yellow, which is hard to see on white; neighbours differ most in lightness.
_COLOURS = ["#000000", VERMILION, "#56B4E9", "#009E73", "#E69F00", BLUE, "#CC79A7"]
_MARKERS = ["o", "s", "D", "^", "v", "P", "X"]


def canvas(figure: Any, width: float, height: float) -> Any:
    """`figure` if it is given, otherwise a new figure of this size in inches."""
    try:
        from matplotlib.figure import Figure, FigureBase
    except ImportError as error:
        raise ImportError(
            "torchreg.plots draws with Matplotlib, which is missing; in the checkout: pip install '.[plots]'"
        ) from error
    if figure is None:
        figure = Figure(figsize=(width, height), layout="constrained")
        # A notebook displays a figure by itself only if pyplot is loaded; otherwise it calls this method.
        vars(figure)["_repr_png_"] = functools.partial(_png, figure)
    elif not isinstance(figure, FigureBase):
        raise TypeError(f"figure is a {type(figure).__name__}; pass a matplotlib Figure or one of its subfigures(1, 2)")
    return figure


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def only_axes(parent: Any) -> Axes:
    """The axes of a figure that has a single plot."""
    axes: Axes = parent.subplots()
    plain_frame(axes)
    return axes


def plain_frame(axes: Axes) -> None:
    """Removes the upper and the right edge of the frame, and makes the tick labels small."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", labelsize="small")


def styles() -> Iterator[dict[str, Any]]:
    """Colour, line style and marker of the first series, the second, and so on without end."""
    for i in itertools.count():
        yield {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": DASHES[i % len(DASHES)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "markersize": 5,
            "linewidth": 1.4,
        }


def share_axis(axes: Axes, label: str) -> None:
    """Makes the vertical axis one of shares from 0 to 1, labelled in percent."""
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel(label, fontsize="small")
    axes.grid(color="0.9", linewidth=0.6)


def label_ends(axes: Axes, lines: Sequence[Line2D]) -> None:
    """Writes the label of each line next to the end of the line; labels do not overlap."""
    ends = []
    for line in lines:
        heights = torch.as_tensor(line.get_ydata(), dtype=torch.float64, device="cpu")
        if len(heights := heights[~heights.isnan()]):
            ends.append((heights[-1].item(), line))
    ends.sort(key=lambda end: end[0])
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)  # the positions are in units of this axis, so it must not change any more
    gap = 0.16 / (0.75 * inches_high(axes.figure)) * (high - low)
    positions = spread_apart([height for height, _ in ends], gap, low, high)
    for position, (height, line) in zip(positions, ends, strict=True):
        axes.annotate(
            str(line.get_label()),
            (1, height),
            xycoords=axes.get_yaxis_transform(),
            xytext=(1.05, position),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize="small",
            arrowprops={
                "arrowstyle": "-",
                "color": line.get_color(),
                "relpos": (0, 0.5),  # the arrow ends at the left edge of the text
                "shrinkA": 0,
                "shrinkB": 0,
            },
        )


def spread_apart(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions that are at least `gap` apart and lie between low and high, nearest to `positions` in least squares.

    `positions` must be ascending. After subtraction of i·gap from the i-th position this is isotonic regression:
    neighbours that are too close are pooled, and the bounds clip the result.
    """
    pools: list[tuple[float, int]] = []
    for i, position in enumerate(positions):
        mean, size = position - i * gap, 1
        while pools and pools[-1][0] > mean:
            pool_mean, pool_size = pools.pop()
            mean, size = (pool_mean * pool_size + mean * size) / (pool_size + size), pool_size + size
        pools.append((mean, size))
    levels = [mean for mean, size in pools for _ in range(size)]
    return [max(low, min(level, high - (len(levels) - 1) * gap)) + i * gap for i, level in enumerate(levels)]


def inches_high(parent: Any) -> float:
    """The height of a figure or subfigure in inches."""
    return float(parent.bbox.height / parent.figure.dpi)


def plain_label(name: str, longest: int = 32) -> str:
    """The name of a parameter as literal text: a $ starts no formula, and control characters have no effect."""
    return shortened(printable(name, len(name)), longest).replace("$", r"\$")


def shortened(name: str, longest: int = 32) -> str:
    """`name` without its middle if it is too long, since the names of layers differ at both ends."""
    return name if len(name) <= longest else f"{name[: longest // 2 - 1]}…{name[-(longest // 2) :]}"
