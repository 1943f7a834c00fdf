"""Rounding by chance: to one of two neighbours, with the probability that makes the mean the value."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from torchreg.kernels.random_bits import draws, stochastic, word_of

ALL = torch.arange(65536, dtype=torch.int32)
CPU = torch.device("cpu")
DTYPES = {torch.bfloat16: (7, -126), torch.float16: (10, -14)}
"""Bits after the point, and the least exponent."""


def neighbours(x: float, dtype: torch.dtype) -> tuple[Fraction, Fraction]:
    """Of a positive float32, by exact arithmetic: the largest number of `dtype` that is no larger, and the next one."""
    digits, least = DTYPES[dtype]
    spacing = Fraction(2) ** (max(math.frexp(x)[1] - 1, least) - digits)
    below = Fraction(x) // spacing * spacing
    return below, below + spacing


def of_bits(*bits: int) -> list[float]:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).tolist()


VALUES = [
    *of_bits(0x3F800001, 0x3F80FFFF, 0x3FFFFFFF, 0x3E99999A, 0x00800123, 0x00345678, 0x7E123456),
    1 / 3,
    1e-3,
    2**-9,
]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("x", VALUES)
def test_of_all_random_numbers_as_many_round_up_as_the_fraction_says(x: float, sign: int) -> None:
    x = torch.tensor(x, dtype=torch.float32).item()
    below, above = neighbours(x, torch.bfloat16)
    rounded = sign * stochastic(torch.full((65536,), sign * x), torch.bfloat16, ALL).double()
    assert set(rounded.unique().tolist()) <= {float(below), float(above)}
    assert Fraction(int((rounded == float(above)).sum()), 65536) == (Fraction(x) - below) / (above - below)


@pytest.mark.parametrize("x", [1.0 + 2**-23, 1 / 3, 1e-3, 2000.7, 3 * 2**-15, 2**-14 - 2**-27, 5.5 * 2**-24, 2**-26])
def test_in_float16_too_down_to_its_smallest_numbers(x: float) -> None:
    x = torch.tensor(x, dtype=torch.float32).item()
    below, above = neighbours(x, torch.float16)
    rounded = stochastic(torch.full((65536,), x), torch.float16, ALL).double()
    assert set(rounded.unique().tolist()) <= {float(below), float(above)}
    assert Fraction(int((rounded == float(above)).sum()), 65536) == (Fraction(x) - below) / (above - below)


@pytest.mark.parametrize("random", [0, 1, 32768, 65535])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_the_dtype_stays_what_it_is(dtype: torch.dtype, random: int) -> None:
    """With both zeros, the infinities, and NaN, which no carry turns into a number."""
    numbers = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    rounded = stochastic(numbers.float(), dtype, torch.full((65536,), random, dtype=torch.int32))
    assert torch.equal(rounded.isnan(), numbers.isnan())
    kept = ~numbers.isnan()
    assert torch.equal(rounded[kept].view(torch.int16), numbers[kept].view(torch.int16))


def of(key: int, step: int, first: int = 0, size: int = 1 << 18) -> tuple[Tensor, Tensor, Tensor]:
    return draws(word_of(key, torch.tensor(float(step))), first, size, CPU)


def test_each_draw_is_spread_evenly_over_its_65536_numbers() -> None:
    """χ² over 1024 bins has the mean 1023 and the standard deviation 45: within 6 of them."""
    for key, step in ((0, 1), (1, 1), (0, 2), (123456789, 10_000)):
        for draw in of(key, step):
            assert draw.dtype is torch.int32
            counts = torch.bincount(draw >> 6, minlength=1024).double()
            assert counts.numel() == 1024
            expected = draw.numel() / 1024
            assert abs(float(((counts - expected) ** 2 / expected).sum()) - 1023) < 6 * 45
            assert len(torch.bincount(draw & 63)) == 64


def test_draws_places_steps_and_keys_have_nothing_to_do_with_each_other() -> None:
    """The correlation of n independent pairs has the standard deviation 1/√n: within 6 of them."""
    first = of(7, 100)
    n = first[0].numel()
    others = [
        *of(7, 101),
        *of(8, 100),
        *of(7, 100 + 4096),
        *(draw.roll(1) for draw in first),
        *(d.roll(64) for d in first),
    ]
    pairs = [(a, b) for a in first for b in others] + [(first[0], first[1]), (first[0], first[2]), (first[1], first[2])]
    for a, b in pairs:
        correlation = torch.corrcoef(torch.stack([a, b]).double())[0, 1]
        assert abs(float(correlation)) < 6 / math.sqrt(n)


def test_a_piece_has_the_bits_of_its_places() -> None:
    whole, piece = of(3, 5), of(3, 5, first=1000, size=77)
    assert all(torch.equal(a[1000:1077], b) for a, b in zip(whole, piece, strict=True))


def test_the_bits_of_one_weight_differ_from_step_to_step() -> None:
    """A single weight's rounding over time has the mean of its value too: 4096 steps, within 6 standard deviations."""
    numbers = torch.tensor([of(11, step, first=42, size=1)[0].item() for step in range(1, 4097)], dtype=torch.float64)
    assert abs(float(numbers.mean()) - 32767.5) < 6 * 65536 / math.sqrt(12 * 4096)
    assert len(numbers.unique()) > 3800
