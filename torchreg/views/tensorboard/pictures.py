"""The pictures of the dashboard: input maps, masks, filters and histograms of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchreg.binding import connectivity
from torchreg.binding.selection import ParameterRef
from torchreg.views import plots
from torchreg.views.tensorboard import records
from torchreg.views.tensorboard.layout import evenly_spread
from torchreg.views.weight_maps import input_strengths, mask_pixels

# Nine colours of viridis, which is nearly linear between them. Importing Matplotlib for it takes a third of a second.
_VIRIDIS = "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725"
_DEAD = 211  # light grey


class History:
    """The sparsity of every layer over time, thinned out so that its size is bounded for any number of steps."""

    MAX_POINTS = 256

    def __init__(self) -> None:
        self._points: list[tuple[int, dict[str, float]]] = []
        self._stride, self._n_added = 1, 0

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Adds a point. With many points only every second, fourth, ... one is kept."""
        if self._n_added % self._stride == 0:
            shares = {
                key: value for key, value in numbers.items() if key.startswith(("sparsity/", "overview/sparsity"))
            }
            self._points.append((step, shares))
        self._n_added += 1
        if len(self._points) == self.MAX_POINTS:
            self._points, self._stride = self._points[::2], 2 * self._stride

    def go_back(self, step: int) -> None:
        """Forgets the points from `step` on."""
        self._points = [point for point in self._points if point[0] < step]

    def figures(self) -> Iterator[Any]:
        """The figure of `plots.sparsity_over_time`; none without points."""
        if self._points:
            steps, numbers = zip(*self._points, strict=True)
            yield plots.sparsity_over_time(steps, numbers)


def pictures(entries: Sequence[ParameterRef], tags: Mapping[str, str]) -> Iterator[Any]:
    """The images and histograms of the weights as they are now, as values of TensorBoard."""
    first = next((entry for entry in entries if entry.parameter.dim() > 1), None)
    if first is not None and first.parameter.numel() and len(strengths := input_strengths(first)) > 1:
        yield records.image(f"weight_input_map/{tags[first.name]}", input_pixels(strengths))
    convolution = next((e for e in entries if isinstance(e.owner, nn.Conv2d) and e.parameter.dim() == 4), None)
    if convolution is not None and convolution.parameter.numel():
        yield records.image(
            f"weight_filters/{tags[convolution.name]}", filter_pixels(connectivity.weights(convolution))
        )
    for entry in evenly_spread(entries):
        tag = tags[entry.name]
        if entry.parameter.numel():
            yield records.image(f"weight_masks/{tag}", 1 - mask_pixels(entry))
        histogram = records.histogram(f"weight_nonzero/{tag}", connectivity.weights(entry))
        if histogram is not None:
            yield histogram


def input_pixels(strengths: Tensor) -> Tensor:
    """Strengths of inputs as an image of (height, width, 3) bytes.

    64, 81, 100, ... inputs are a square, all others a strip.
    """
    count = len(strengths)
    side = math.isqrt(count)
    square = side >= 8 and side * side == count
    if not square and count > 512:  # a pixel is the strongest of several neighbouring inputs
        strengths = nn.functional.adaptive_max_pool1d(strengths[None], 512)[0]
    rows = (strengths.reshape(side, side) if square else strengths[None]).cpu()
    finite = rows[rows.isfinite()]
    top = finite.amax() if len(finite) else rows.new_ones(())
    return _viridis(rows / top.where(top > 0, 1)).where((rows != 0)[..., None], _DEAD)


def filter_pixels(w: Tensor, most: int = 64) -> Tensor:
    """Filters (outputs, inputs, height, width) next to each other, as an image in which 0 is mid grey.

    Filters of three inputs are in colour. With another number each input has a tile, and a filter is a row of tiles.
    """
    w = (w.abs() if w.is_complex() else w).float().cpu()
    finite = w[w.isfinite()].abs()
    scale = finite.amax().clamp(min=torch.finfo(w.dtype).tiny) if len(finite) else w.new_ones(())
    # Rounded away from the grey of 0, so that a small nonzero weight does not look like a zero.
    tiles = 128 + w.sign() * (127 * w.abs() / scale).ceil().clamp(max=127)
    tiles = tiles.nan_to_num(255).to(torch.uint8)
    inputs = min(8, w.shape[1])
    if inputs == 3:
        tiles = tiles[:most].permute(0, 2, 3, 1)
    else:
        tiles = tiles[: most // inputs, :inputs].flatten(0, 1)[..., None].expand(-1, -1, -1, 3)
    columns = math.isqrt(len(tiles) - 1) + 1 if inputs in (1, 3) else inputs
    rows = -(-len(tiles) // columns)
    height, width = tiles.shape[1:3]
    page = tiles.new_full((rows * columns, height + 1, width + 1, 3), 255)
    page[: len(tiles), :height, :width] = tiles
    return page.reshape(rows, columns, height + 1, width + 1, 3).transpose(1, 2).reshape(rows * (height + 1), -1, 3)


def _viridis(shares: Tensor) -> Tensor:
    """Shares in [0, 1] as (..., 3) bytes; white where a share is not finite."""
    rows = [list(bytes.fromhex(colour)) for colour in _VIRIDIS.split()]
    table = torch.tensor(rows, dtype=torch.float32, device="cpu")  # even if the default device is another
    shares = shares.detach().float().cpu()
    position = shares.nan_to_num(0.0).clamp(0, 1) * (len(table) - 1)
    lower = position.floor().long().clamp(max=len(table) - 2)
    colours = torch.lerp(table[lower], table[lower + 1], (position - lower)[..., None])
    return colours.round().to(torch.uint8).where(shares.isfinite()[..., None], 255)
