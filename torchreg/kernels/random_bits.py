"""Random bits that are a function of a key, a step and a place in memory, and the rounding that takes them.

No generator has a state: the bits are the same in C and in torch, on any device, in any number of threads, and after a
checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

GOLDEN, FIRST, SECOND = 0x9E3779B9 - (1 << 32), 0x7FEB352D, 0x846CA68B - (1 << 32)
"""2³² over the golden ratio, and the factors of Wellons' `lowbias32`; as in `native.c`."""


def word_of(key: int, step: Tensor) -> Tensor:
    """The word that the random bits of a weight begin with in this step: 0-d, int32.

    Args:
        key: at least 0 and below 2³¹: another for each weight of an optimizer.
        step: 0-d, the count of steps; it is not read, so it may lie on a device.
    """
    return _mixed_(step.to(torch.int32) * GOLDEN + key)


def draws(word: Tensor, first: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Three times 16 random bits for each of `size` places in a weight's memory, from place `first` on.

    Returns:
        int32 tensors, from 0 to 65535.
    """
    places = torch.arange(first, first + size, dtype=torch.int32, device=device)
    bits = _mixed_(places.bitwise_xor_(word))
    return bits & 0xFFFF, _shifted(bits, 16), _shifted(bits.mul_(GOLDEN), 16)


def stochastic(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """`x` rounded to one of its two neighbours in `dtype`, to the nearer one more often: its mean is `x`.

    A value of `dtype` stays what it is; so do infinities and NaN.

    Args:
        x: float32.
        dtype: bfloat16, where as many of the 65536 `random` numbers round away from 0 as `x` has 65536ths on the way
            to that neighbour; or float16, where it is 8192ths.
        random: int32 from 0 to 65535, of `x`'s shape.

    >>> x = torch.tensor([1 + 2**-9, 1 + 2**-9, 0.0])  # a quarter of the way from 1 to its neighbour 1 + 2⁻⁷
    >>> stochastic(x, torch.bfloat16, torch.tensor([49151, 49152, 65535], dtype=torch.int32))
    tensor([1.0000, 1.0078, 0.0000], dtype=torch.bfloat16)
    """
    bits = x.view(torch.int32)
    if dtype is torch.bfloat16:
        finite = (bits & 0x7FFFFFFF) < 0x7F800000
        return (random * finite).add_(bits).bitwise_and_(-0x10000).view(torch.float32).to(dtype)
    # The spacing is that of 2⁻¹⁴ from there down to 0.
    spacing = (bits & 0x7F800000).clamp_(min=0x38800000).view(torch.float32) * 2.0**-10
    rounded = x.abs().div_(spacing).add_(random >> 3, alpha=2.0**-13).floor_().mul_(spacing).copysign_(x)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def _mixed_(x: Tensor) -> Tensor:
    """Wellons' `lowbias32`, a bijection of 32 bits; int32 products wrap around."""
    x.bitwise_xor_(_shifted(x, 16)).mul_(FIRST)
    x.bitwise_xor_(_shifted(x, 15)).mul_(SECOND)
    return x.bitwise_xor_(_shifted(x, 16))


def _shifted(x: Tensor, by: int) -> Tensor:
    """A shift that fills up with zeros, where that of a negative int32 fills up with ones."""
    return (x >> by).bitwise_and_((1 << (32 - by)) - 1)
