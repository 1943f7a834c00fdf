"""What the dashboard shows of weights: input maps, masks, filters and histograms."""

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
from torchreg.views.tensorboard.layout import some

# Nine of its colours; between them it is all but straight. Matplotlib takes a third of a second to import.
_COLOURS = "440154 472d7b 3b528b 2c728e 21918c 28ae80 5ec962 addc30 fde725"
_DEAD = 211  # light grey


class History:
    """The sparsity of every layer over time, thinned out so that it takes no more room however long a run is."""

    MOST = 256

    def __init__(self) -> None:
        self._points: list[tuple[int, dict[str, float]]] = []
        self._stride, self._seen = 1, 0

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """One more point, or none: where there are many, every other one is dropped."""
        if self._seen % self._stride == 0:
            wanted = {
                key: value for key, value in numbers.items() if key.startswith(("sparsity/", "overview/sparsity"))
            }
            self._points.append((step, wanted))
        self._seen += 1
        if len(self._points) == self.MOST:
            self._points, self._stride = self._points[::2], 2 * self._stride

    def cut(self, step: int) -> None:
        """Forgets what was from `step` on."""
        self._points = [point for point in self._points if point[0] < step]

    def figures(self) -> Iterator[Any]:
        """`plots.sparsity_over_time` of it; none where nothing was measured."""
        if self._points:
            steps, numbers = zip(*self._points, strict=True)
            yield plots.sparsity_over_time(steps, numbers)


def pictures(entries: Sequence[ParameterRef], tags: Mapping[str, str]) -> Iterator[Any]:
    """The images and histograms of one moment, as TensorBoard's values."""
    first = next((entry for entry in entries if entry.parameter.dim() > 1), None)
    if first is not None and first.parameter.numel() and len(strengths := plots.input_strengths(first)) > 1:
        yield records.image(f"weight_input_map/{tags[first.name]}", input_pixels(strengths))
    convolution = next((e for e in entries if isinstance(e.owner, nn.Conv2d) and e.parameter.dim() == 4), None)
    if convolution is not None and convolution.parameter.numel():
        yield records.image(
            f"weight_filters/{tags[convolution.name]}", filter_pixels(connectivity.weights(convolution))
        )
    for entry in some(entries):
        tag = tags[entry.name]
        if entry.parameter.numel():
            yield records.image(f"weight_masks/{tag}", 1 - plots.mask_pixels(entry))
        drawn = records.histogram(f"weight_nonzero/{tag}", connectivity.weights(entry))
        if drawn is not None:
            yield drawn


def input_pixels(strengths: Tensor) -> Tensor:
    """Strengths of inputs as an image of (height, width, 3) bytes: a square of 64, 81, 100 ... inputs, else a strip."""
    count = len(strengths)
    side = math.isqrt(count)
    square = side >= 8 and side * side == count
    if not square and count > 512:  # of each stretch the strongest
        strengths = nn.functional.adaptive_max_pool1d(strengths[None], 512)[0]
    rows = (strengths.reshape(side, side) if square else strengths[None]).cpu()
    finite = rows.isfinite()
    top = rows[finite].amax() if bool(finite.any()) else rows.new_ones(())
    return _viridis(rows / top.where(top > 0, 1)).where((rows != 0)[..., None], _DEAD)


def filter_pixels(w: Tensor, most: int = 64) -> Tensor:
    """Filters (outputs, inputs, height, width) side by side, as an image: 0 is mid grey.

    Filters of three inputs are in colour. Of more inputs each has a tile, in one row a filter.
    """
    w = (w.abs() if w.is_complex() else w).float().cpu()
    finite = w[w.isfinite()].abs()
    scale = finite.amax().clamp(min=torch.finfo(w.dtype).tiny) if len(finite) else w.new_ones(())
    # Whole steps away from the grey of 0: however small a weight is, it does not look like none.
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
    """Shares in [0, 1] as (..., 3) bytes; white where they are not finite."""
    rows = [list(bytes.fromhex(colour)) for colour in _COLOURS.split()]
    table = torch.tensor(rows, dtype=torch.float32, device="cpu")  # whatever the default device is
    shares = shares.detach().float().cpu()
    place = shares.nan_to_num(0.0).clamp(0, 1) * (len(table) - 1)
    below = place.floor().long().clamp(max=len(table) - 2)
    colours = torch.lerp(table[below], table[below + 1], (place - below)[..., None])
    return colours.round().to(torch.uint8).where(shares.isfinite()[..., None], 255)
