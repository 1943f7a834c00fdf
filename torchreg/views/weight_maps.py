"""Maps of one weight, as tensors: the norm of each input, and the positions of the nonzeros. No Matplotlib."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchreg._tensors import widened
from torchreg.binding import connectivity
from torchreg.binding.selection import ParameterRef


def input_strengths(entry: ParameterRef) -> Tensor:
    """The norm ‖w_j‖₂ of all weights that read input j; it is 0 if and only if all of them are 0.

    Args:
        entry: a parameter, as `torchreg.select` returns it. Entries that torch.nn.utils.prune masks count as 0.
    Returns:
        (inputs,): one number per feature of a linear layer or channel of a convolution (grouped and transposed ones
        included), on the device of the weight, in float32 or wider. The host does not wait for the device.
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
    size = size.transpose(1, 2).flatten(0, 1).flatten(1)  # (inputs, the weights that read each of them)
    if not size.numel():
        return size.new_zeros(len(size))
    # Squares of small weights would underflow to 0 in float32, and a live input would look dead.
    peak = size.amax(1)
    scale = peak.where(peak > 0, 1)
    return scale * torch.linalg.vector_norm(size / scale[:, None], dim=1)


def mask_pixels(entry: ParameterRef, side: int = 256) -> Tensor:
    """The nonzeros of a weight as an image: neurons are rows, inputs (times the kernel) are columns.

    Args:
        entry: a parameter, as `torchreg.select` returns it.
        side: the largest number of pixels in each direction. For a larger weight a pixel is the share of nonzeros in a
            block of entries; blocks do not overlap, and the last ones may be smaller.
    Returns:
        (height, width), at most (side, side), in [0, 1], float32, on the device of the weight. A vector is one column.

    >>> net = nn.Linear(4, 2)
    >>> with torch.no_grad():
    ...     _ = net.weight.copy_(torch.tensor([[3.0, 0.0, 1.0, 0.0], [4.0, 5.0, 0.0, 0.0]]))
    >>> mask_pixels(tr.select(net)[0], side=2)
    tensor([[0.5000, 0.5000],
            [1.0000, 0.0000]])
    """
    pixels = nonzero_matrix(entry).float()
    block = [max(1, -(-length // side)) for length in pixels.shape]
    if not pixels.numel() or block == [1, 1]:
        return pixels
    # ceil_mode keeps the incomplete blocks at the end and divides by the number of entries in them.
    return nn.functional.avg_pool2d(pixels[None], block, ceil_mode=True)[0]


def nonzero_matrix(entry: ParameterRef) -> Tensor:
    """Whether each entry of a weight is nonzero, in two dimensions: (neurons, inputs × kernel)."""
    alive = connectivity.by_input(connectivity.nonzero(entry), entry.owner)
    return alive.reshape(alive.shape[0] * alive.shape[1], math.prod(alive.shape[2:]))
