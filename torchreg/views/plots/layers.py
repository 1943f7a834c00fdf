"""Plots of all layers over a training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchreg.views.plots import style
from torchreg.views.plots.arguments import finite_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure
    from numpy.typing import ArrayLike


def sparsity_over_time(
    steps: ArrayLike | Tensor,
    measurements: Sequence[Mapping[str, Any]],
    *,
    figure: Figure | SubFigure | None = None,
) -> Figure:
    """Draws the share of exact zeros in each layer, and in all layers together, while a network trains.

    Up to six layers are lines with their names at the end. More layers are the rows of a heat map below a line of the
    total; with hundreds of layers only some rows are named. A line joins the steps at which its layer was measured; a
    row is grey at the other steps.

    Args:
        steps: the steps of the measurements, increasing.
        measurements: one dict per step: `sparsity/<parameter name>` for the layers and `overview/sparsity` for the
            total, 0 to 1. Other keys are ignored, so dicts of `torchreg.measure` can be passed unchanged.
        figure: the figure to draw into; a new figure by default.
    Shape:
        steps (points,), as many measurements.
    Raises:
        TypeError: a measurement is not a mapping, or a sparsity is not a number.
        ValueError: the lengths differ, no sparsity was measured, one is not in [0, 1], or the steps do not increase.
        ImportError: Matplotlib is missing.

    >>> measurements = [{"sparsity/fc1.weight": share, "overview/sparsity": share / 2} for share in (0.0, 0.8)]
    >>> figure = sparsity_over_time([0, 100], measurements)
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['total', 'fc1.weight']
    """
    times = finite_numbers("steps", steps, (1,))
    layers, total = _shares(measurements)
    if len(times) != len(measurements):
        raise ValueError(
            f"{len(times)} steps and {len(measurements)} measurements do not pair up; give one step for each"
        )
    for step, next_step in itertools.pairwise(times.tolist()):
        if next_step <= step:
            raise ValueError(f"in steps {next_step:g} follows {step:g}; give them in order, each once")
    if len(layers) > style.MAX_LINES:
        return _heat_map(times, layers, total, figure)

    parent = style.canvas(figure, 5.5, 3.2)
    axes = style.only_axes(parent)
    marker = "o" if len(times) == 1 else ""
    curves = {} if total is None else {"total": total}
    curves.update(layers)
    lines = []
    for (name, shares), look in zip(curves.items(), style.styles(), strict=False):
        has_value = ~shares.isnan()
        look.update(marker=marker, linewidth=2.2 if shares is total else look["linewidth"])
        lines += axes.plot(times[has_value], shares[has_value], **look, label=style.plain_label(name))
    axes.margins(x=0)
    axes.set_xlabel("step", fontsize="small")
    style.share_axis(axes, "exact zeros")
    style.label_ends(axes, lines)
    return parent.figure


def _shares(measurements: object) -> tuple[dict[str, Tensor], Tensor | None]:
    """The sparsity of each layer over time, and that of all layers; NaN where it was not measured."""
    if not isinstance(measurements, Sequence) or not all(isinstance(numbers, Mapping) for numbers in measurements):
        raise TypeError(f"expected measurements as a list of dicts, one per step, got {type(measurements).__name__}")
    keys = dict.fromkeys(key for numbers in measurements for key in numbers if isinstance(key, str))
    shares = {key: _share_of(key, measurements) for key in keys if key.startswith("sparsity/")}
    total = _share_of("overview/sparsity", measurements) if "overview/sparsity" in keys else None
    if not shares and total is None:
        raise ValueError(
            f"no sparsity was measured among {list(keys)[:5]}; its keys are sparsity/<name> and overview/sparsity"
        )
    return {key.removeprefix("sparsity/"): values for key, values in shares.items()}, total


def _share_of(key: str, measurements: Sequence[Mapping[str, Any]]) -> Tensor:
    values = []
    for numbers in measurements:
        try:
            value = float(numbers.get(key, math.nan))
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{key} is {numbers[key]!r}, not a number; measure a share, 0 to 1") from error
        if value < 0 or value > 1:
            raise ValueError(f"{key} is {value:g}, but a share lies between 0 and 1; divide percents by 100")
        values.append(value)
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _heat_map(times: Tensor, layers: Mapping[str, Tensor], total: Tensor | None, figure: Any) -> Figure:
    from matplotlib import colormaps
    from matplotlib.ticker import PercentFormatter

    count = len(layers)
    parent = style.canvas(figure, 6.0, 2 + min(0.14 * count, 5.5))
    if total is None:
        lower = parent.subplots()
    else:
        upper, lower = parent.subplots(2, 1, sharex=True, height_ratios=[1, 4])
        style.plain_frame(upper)
        upper.plot(times, total, color="black", linewidth=1.8, marker="o" if len(times) == 1 else "", label="total")
        style.share_axis(upper, "total")
    middles = (times[1:] + times[:-1]) / 2
    # The cell of a measurement reaches halfway to both neighbours; the first and the last cell are symmetric.
    ends = (
        (2 * times[:1] - middles[:1], 2 * times[-1:] - middles[-1:]) if len(times) > 1 else (times - 0.5, times + 0.5)
    )
    edges = torch.cat([ends[0], middles, ends[1]])
    mesh = lower.pcolormesh(
        edges.numpy(),
        range(count + 1),
        torch.stack(list(layers.values())).numpy(),
        cmap=colormaps["viridis"].with_extremes(bad=style.DEAD),
        vmin=0,
        vmax=1,
        rasterized=True,  # no reader opens a PDF of hundreds of thousands of cells
    )
    pattern, names = without_common_parts(list(layers))
    stride = math.ceil(count / max(1, (style.inches_high(parent) - 0.7) * (0.95 if total is None else 0.75) / 0.12))
    lower.set_yticks([i + 0.5 for i in range(0, count, stride)], [style.plain_label(name) for name in names[::stride]])
    lower.tick_params(axis="y", labelsize="x-small", length=0)
    lower.tick_params(axis="x", labelsize="small")
    lower.invert_yaxis()
    lower.set_xlabel("step", fontsize="small")
    note = f"\n{count} rows, 1 in {stride} named" if stride > 1 else ""
    lower.set_ylabel(style.plain_label(pattern, 50) + note, fontsize="small")
    bar = parent.colorbar(mesh, ax=lower, format=PercentFormatter(1))
    bar.set_label("exact zeros", fontsize="small")
    bar.ax.tick_params(labelsize="small")
    return parent.figure


def without_common_parts(names: Sequence[str]) -> tuple[str, list[str]]:
    """The pattern of dotted names ("layers.*.weight"), and the part of each name that the * stands for.

    >>> without_common_parts(["layers.0.weight", "layers.1.weight"])
    ('layers.*.weight', ['0', '1'])
    """
    split = [name.split(".") for name in names]
    limit = min(map(len, split)) - 1  # at least one part of the shortest name stays
    first = next((i for i in range(limit) if len({parts[i] for parts in split}) > 1), limit)
    last = next((i for i in range(limit - first) if len({parts[-1 - i] for parts in split}) > 1), limit - first)
    pattern = ".".join([*split[0][:first], "*", *split[0][len(split[0]) - last :]])
    return "layer" if pattern == "*" else pattern, [".".join(parts[first : len(parts) - last]) for parts in split]
