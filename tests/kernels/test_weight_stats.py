"""Statistics of weights against NumPy in double precision, on every backend and in every kind of memory."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import oracles
from tests.backends import backend as backend
from tests.backends import needs_native
from tests.cases import DTYPES, layouts, weights
from torchreg.kernels import Summary, summarize

# Tiles have 16 rows of 1,024 entries; a task has no fewer than 32,768.
SHAPES = [
    *((), (0,), (1,), (513,), (0, 3), (3, 0), (1, 1), (16, 1024), (17, 513), (300, 784), (2, 1025), (1000, 3)),
    *((4, 3, 2), (33, 20, 3, 3), (2, 0, 3), (600, 5, 40)),
]
SUMS = 1e-6


def expected(w: Tensor, near_zero: float) -> dict[str, np.ndarray]:
    x = np.abs(oracles.to_numpy(w.detach().resolve_neg()))
    x = x.reshape(-1, 1, 1) if x.ndim < 2 else x.reshape(*x.shape[:2], math.prod(x.shape[2:]))
    nonzero, square = x != 0, x * x
    return {
        "counts": np.array([(~nonzero).sum(), (x <= near_zero).sum(), (~np.isfinite(x)).sum(), 0]),
        "sums": np.array([x.sum(), square.sum(), x.max(initial=0)]),
        "row_nonzeros": nonzero.sum((1, 2)),
        "row_squares": square.sum((1, 2)),
        "column_nonzeros": nonzero.sum((0, 2)),
        "column_squares": square.sum((0, 2)),
    }


def assert_right(summary: Summary, w: Tensor, near_zero: float, tolerance: float = SUMS) -> None:
    for name, truth in expected(w, near_zero).items():
        found = getattr(summary, name)
        assert found.shape == truth.shape, name
        if truth.dtype.kind == "i":
            assert found.dtype == torch.int64
            assert np.array_equal(found.numpy(), truth), name
        else:
            np.testing.assert_allclose(found.numpy(), truth, rtol=tolerance, atol=0, err_msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counts_are_exact_and_sums_right_in_every_shape_and_dtype(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    w = weights(shape, dtype)
    tolerance = 1e-13 if dtype in (torch.float64, torch.complex128) else SUMS
    [summary] = summarize([w], near_zero=0.125)
    assert_right(summary, w, 0.125, tolerance)


def test_many_weights_of_all_kinds_at_once_come_back_in_order(backend: str) -> None:
    many = [weights(shape, dtype, seed) for seed, (shape, dtype) in enumerate(zip(SHAPES, DTYPES * 3, strict=False))]
    for summary, w in zip(summarize(many, near_zero=0.01), many, strict=True):
        assert_right(summary, w, 0.01)
    assert summarize([]) == []


def test_every_layout_gives_the_same(backend: str) -> None:
    w = weights((20, 6, 3, 3), torch.float32)
    for other in [*layouts(w), w.to(memory_format=torch.channels_last), w.flip(0)]:
        [summary] = summarize([other])
        assert_right(summary, other, 0.0)


def test_a_lazily_negated_and_a_parameter_with_a_gradient_are_read_as_they_are(backend: str) -> None:
    lazy = torch.view_as_complex(weights((5, 4, 2))).conj().imag
    assert lazy.is_neg()
    parameter = torch.nn.Parameter(weights((5, 4)))
    for w in (lazy, parameter):
        [summary] = summarize([w])
        assert_right(summary, w, 0.0, 1e-13)
        assert not summary.sums.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_finite_is_counted_and_is_no_zero(backend: str, dtype: torch.dtype) -> None:
    w = torch.ones(40, 600, dtype=dtype)
    w[3, 7], w[5, 599], w[39, 0] = torch.inf, -torch.inf, 0.0
    [summary] = summarize([w], near_zero=0.5)
    assert summary.counts.tolist() == [1, 1, 2, 0]
    assert summary.sums.tolist() == [math.inf] * 3
    w[4, 100] = torch.nan
    [summary] = summarize([w], near_zero=0.5)
    assert summary.counts.tolist() == [1, 1, 3, 0]
    assert summary.sums.isnan().all()
    assert summary.row_nonzeros.tolist() == [600] * 39 + [599]
    assert summary.row_squares.isnan().nonzero().flatten().tolist() == [4]
    assert summary.column_squares.isnan().nonzero().flatten().tolist() == [100]
    assert summary.row_squares.isinf().nonzero().flatten().tolist() == [3, 5]


def test_minus_zero_is_a_zero_and_the_smallest_number_is_none(backend: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        tiny = torch.finfo(dtype).smallest_normal
        w = torch.tensor([[0.0, -0.0, tiny], [-tiny, 1.0, tiny]], dtype=dtype)
        [summary] = summarize([w])
        assert summary.counts.tolist() == [2, 2, 0, 0]
        assert summary.row_nonzeros.tolist() == [1, 3]


@needs_native
@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e25])
def test_squares_outside_of_float32_are_not_lost_natively(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setenv("TORCHREG_BACKEND", "native")
    w = weights((20, 600), torch.float64).mul(size).float()
    [summary] = summarize([w])
    assert_right(summary, w, 0.0)


def test_a_subnormal_half_is_read_right(backend: str) -> None:
    w = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)  # every number there is
    w = w[w.isfinite()]
    [summary] = summarize([w], near_zero=2.0**-20)
    assert_right(summary, w, 2.0**-20)


def test_a_support_tells_how_many_entries_changed_and_is_renewed(backend: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        w = torch.ones(70, 600, dtype=dtype)
        support = torch.zeros(w.shape, dtype=torch.bool)
        assert summarize([w], supports=[support])[0].counts[3] == w.numel()
        assert summarize([w], supports=[support])[0].counts[3] == 0
        w[3, 5], w[69, 599], w[0, 0] = 0.0, -0.0, torch.nan
        assert summarize([w], supports=[support])[0].counts[3] == 2
        assert torch.equal(support, w != 0)


def test_a_support_of_another_kind_is_an_error_and_nothing_has_changed(backend: str) -> None:
    w, fits = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    for support in (torch.zeros(3, 2, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.uint8), fits.t().t()[:, ::2]):
        with pytest.raises(ValueError, match=r"does not fit a weight of shape \(2, 3\) on cpu; start with"):
            summarize([w, w], supports=[fits, support])
    with pytest.raises(ValueError, match="1 supports for 2 weights"):
        summarize([w, w], supports=[fits])
    with pytest.raises(ValueError, match=r"near_zero=-1.* must be finite and at least 0"):
        summarize([w], near_zero=-1.0, supports=[fits])
    with pytest.raises(TypeError, match="needs floating or complex weights"):
        summarize([torch.ones(3, dtype=torch.int64)])
    assert not fits.any()


def test_counts_are_exact_where_float32_cannot_count(backend: str) -> None:
    w = torch.ones((1 << 24) + 3, dtype=torch.bfloat16)
    w[5] = 0
    for shaped in (w.view(1, -1), w.view(-1, 1)):
        [summary] = summarize([shaped])
        assert summary.counts[0] == 1
        assert max(summary.row_nonzeros.max(), summary.column_nonzeros.max()) == (1 << 24) + 2


@needs_native
def test_the_sums_are_the_same_to_the_bit_in_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHREG_BACKEND", "native")
    many = [weights((700, 300), torch.float32), weights((64, 40, 3, 3), torch.bfloat16)]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(summarize(many))
    finally:
        torch.set_num_threads(before)
    for summaries in zip(*found, strict=True):
        for field in dataclasses.fields(Summary):
            first, *others = (getattr(summary, field.name) for summary in summaries)
            assert all(torch.equal(first, other) for other in others)


def test_it_works_on_a_device_without_data() -> None:
    [summary] = summarize([torch.ones(3, 4, 2, device="meta")])
    assert summary.row_squares.device.type == "meta"
    assert (summary.counts.shape, summary.sums.shape, summary.row_squares.shape) == ((4,), (3,), (3,))
    assert summary.sums.dtype == torch.float32, "no device is asked for float64"
