"""Statistics of every weight for a dashboard: zeros, norms, rows and columns, in one pass, without synchronization."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchreg._checks import nonnegative
from torchreg._tensors import checked_weights, widened
from torchreg.kernels.backend import native
from torchreg.kernels.native import DTYPES, Library


@dataclass(frozen=True, eq=False)
class Summary:
    """The statistics of one weight, on its device. A NaN is neither zero nor near zero.

    Attributes:
        counts: int64 of shape (4,): exact zeros, entries with |w| ≤ near_zero, entries that are not finite, and entries
            that have become zero or ceased to be since the last time (0 without `supports`).
        sums: of shape (3,): Σ|w|, Σw² and max|w|; NaN where an entry is.
        row_nonzeros, column_nonzeros: int64, how many nonzeros each row (index of dimension 0) and each column (of
            dimension 1) has.
        row_squares, column_squares: Σw² of each row and each column.

    Sums are float64 on a CPU and float32 elsewhere, right to 1e-6 of their size in float32 and below; of squares that
    fall out of float32's range only the native backend keeps track. One column has a weight of fewer than two
    dimensions.
    """

    counts: Tensor
    sums: Tensor
    row_nonzeros: Tensor
    row_squares: Tensor
    column_nonzeros: Tensor
    column_squares: Tensor


def summarize(
    weights: Sequence[Tensor], near_zero: float = 0.0, supports: Sequence[Tensor] | None = None
) -> list[Summary]:
    """The statistics of many weights at once. Nothing synchronizes: read `counts` and `sums` when it suits.

    Args:
        weights: floating or complex, of any shape, device and layout; a complex one by its modulus.
        near_zero: what counts as near zero, in float32 or the weight's wider dtype.
        supports: a bool tensor for each weight, contiguous and of its shape and device: true where the weight was
            nonzero the last time. It is written anew.
    Returns:
        One summary a weight.
    Raises:
        TypeError: a weight is not a floating or complex tensor.
        ValueError: `near_zero` is negative or not finite, or a support does not fit its weight; nothing has changed.

    >>> [summary] = summarize([torch.tensor([[3.0, 0.0], [0.0, -4.0]])])
    >>> summary.counts[0], summary.sums
    (tensor(2), tensor([ 7., 25.,  4.], dtype=torch.float64))
    >>> summary.row_squares.sqrt()
    tensor([3., 4.], dtype=torch.float64)
    """
    near_zero = nonnegative("near_zero", near_zero, "pass a magnitude such as 1e-8")
    weights = [checked_weights("summarize", w) for w in weights]
    known = [None] * len(weights) if supports is None else list(supports)
    if len(known) != len(weights):
        raise ValueError(f"{len(known)} supports for {len(weights)} weights; pass one for each weight")
    for w, support in zip(weights, known, strict=True):
        if support is not None and not _fits(support, w):
            raise ValueError(
                f"support of shape {tuple(support.shape)}, {support.dtype} on {support.device} does not fit a weight "
                f"of shape {tuple(w.shape)} on {w.device}; start with torch.zeros_like(w, dtype=torch.bool)"
            )
    library = native()
    if library is None or torch.compiler.is_compiling():
        return [_in_torch(w, near_zero, support) for w, support in zip(weights, known, strict=True)]
    served = [i for i, w in enumerate(weights) if _is_plain(w)]
    found = dict(
        zip(served, _in_c(library, [weights[i] for i in served], near_zero, [known[i] for i in served]), strict=True)
    )
    return [
        found[i] if i in found else _in_torch(w, near_zero, support)
        for i, (w, support) in enumerate(zip(weights, known, strict=True))
    ]


def _fits(support: Tensor, w: Tensor) -> bool:
    return (
        support.dtype == torch.bool
        and support.shape == w.shape
        and support.device == w.device
        and support.is_contiguous()
    )


def _is_plain(w: Tensor) -> bool:
    """Memory that C can read: no subclass, which may hold no data or not all of it."""
    return (
        type(w) in (Tensor, torch.nn.Parameter)
        and w.is_cpu
        and w.layout is torch.strided
        and w.dtype in DTYPES
        and not w.is_neg()
    )


def _in_c(
    library: Library, weights: Sequence[Tensor], near_zero: float, supports: Sequence[Tensor | None]
) -> list[Summary]:
    weights = [w.contiguous() for w in weights]  # kept until the end of the call
    shapes = [_as_three(w) for w in weights]
    count_sizes = [size for rows, columns, _ in shapes for size in (4, rows, columns)]
    sum_sizes = [size for rows, columns, _ in shapes for size in (3, rows, columns)]
    counts = torch.zeros(sum(count_sizes), dtype=torch.int64, device="cpu")  # whatever the default device is
    sums = torch.zeros(sum(sum_sizes), dtype=torch.float64, device="cpu")
    table, count_at, sum_at = array("q"), counts.data_ptr(), sums.data_ptr()
    for w, support, (rows, columns, inner) in zip(weights, supports, shapes, strict=True):
        known = 0 if support is None else support.data_ptr()
        table.extend((w.data_ptr(), DTYPES[w.dtype], rows, columns, inner, known, count_at, sum_at))
        count_at += 8 * (4 + rows + columns)
        sum_at += 8 * (3 + rows + columns)
    if library.statistics(table.buffer_info()[0], len(weights), near_zero, library.team, library.threads):
        raise MemoryError("no memory for the statistics of the weights; summarize fewer at once")
    a, b = counts.split_with_sizes(count_sizes), sums.split_with_sizes(sum_sizes)
    return [
        _summary(w, a[i], b[i], (a[i + 1], b[i + 1]), (a[i + 2], b[i + 2]))
        for w, i in zip(weights, range(0, len(a), 3), strict=True)
    ]


def _in_torch(w: Tensor, near_zero: float, support: Tensor | None) -> Summary:
    modulus = widened(w.detach()).abs().reshape(_as_three(w))
    double = torch.float64 if w.device.type == "cpu" else modulus.dtype
    # A CPU makes bool tensors five times slower than numbers 0 and 1; all of them in one buffer spares page faults.
    part = torch.empty_like(modulus)

    nonzero = torch.ne(modulus, 0, out=part)
    row_nonzeros, column_nonzeros = _count(nonzero, (1, 2)), _count(nonzero, (0, 2))
    changed = torch.zeros_like(row_nonzeros[:1].sum())
    if support is not None:
        now = nonzero.reshape(w.shape) != 0
        changed = (now != support).sum()
        support.copy_(now)
    near = _count(torch.le(modulus, near_zero, out=part), (1, 2)).sum()
    finite = _count(torch.le(modulus, torch.finfo(modulus.dtype).max, out=part), (1, 2)).sum()
    counts = torch.stack([w.numel() - row_nonzeros.sum(), near, w.numel() - finite, changed])

    total = modulus.sum((1, 2)).to(double).sum()
    largest = modulus.amax().to(double) if w.numel() else torch.zeros_like(total)
    squares = torch.mul(modulus, modulus, out=part)
    row_squares, column_squares = squares.sum((1, 2)).to(double), squares.sum((0, 2)).to(double)
    sums = torch.stack([total, row_squares.sum(), largest])
    return _summary(w, counts, sums, (row_nonzeros, row_squares), (column_nonzeros, column_squares))


def _summary(
    w: Tensor, counts: Tensor, sums: Tensor, by_row: tuple[Tensor, Tensor], by_column: tuple[Tensor, Tensor]
) -> Summary:
    if w.dim() < 2:
        by_row, by_column = by_column, by_row
    return Summary(counts, sums, *by_row, *by_column)


def _as_three(w: Tensor) -> tuple[int, int, int]:
    """Rows, columns and the rest; a vector lies in a single row, along which one can run."""
    if w.dim() < 2:
        return 1, w.numel(), 1
    return w.shape[0], w.shape[1], math.prod(w.shape[2:])


def _count(ones: Tensor, dim: tuple[int, int]) -> Tensor:
    """Σ of zeros and ones: exact in float32 up to 2²⁴, beyond it as integers, which is slow."""
    few = math.prod(ones.shape[d] for d in dim) <= 1 << 24
    return (ones.sum(dim) if few else ones.sum(dim, dtype=torch.int64)).to(torch.int64)
