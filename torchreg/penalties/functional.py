"""Proximal maps as functions: tensors in, tensors out. `__all__` is what users call; the penalties share the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchreg._tensors import ALONE, ReduceGroup, Step, is_transformed

__all__ = ["firm_threshold", "group_soft_threshold", "hard_threshold", "soft_threshold"]


def soft_threshold(w: Tensor, threshold: Step) -> Tensor:
    """sign(w)·max(|w| − threshold, 0): exact zeros wherever |w| ≤ threshold.

    It is argmin_u ½(u − w)² + threshold·|u| at each entry. Complex weights keep their phase and lose modulus.

    Args:
        w: real or complex weights of any shape.
        threshold: a number ≥ 0, or a real tensor ≥ 0 that broadcasts against `w`. It is not validated:
            a negative entry gives a meaningless result, not an error.
    Returns:
        A new tensor of `w`'s shape. A NaN in `w` stays a NaN where it is.
    Source: Donoho and Johnstone, 1994; for complex weights Maleki et al., 2013.

    >>> soft_threshold(torch.tensor([2.0, -0.25, 0.0]), 0.5)
    tensor([1.5000, 0.0000, 0.0000])
    """
    if w.is_complex():
        modulus = w.abs()
        kept = (modulus - threshold).clamp(min=0)
        # A zero has no phase: divide by 1 there, so that 0/0 never arises. Adding 0.0 turns -0.0 into 0.0.
        return w * (kept / torch.where(modulus > 0, modulus, 1)) + 0.0
    if isinstance(threshold, Tensor):
        low = -threshold
        if torch.is_grad_enabled() or low.shape != w.shape or low.dtype != w.dtype or is_transformed():
            return w - torch.clamp(w, low, threshold)
        # In one buffer: page faults of fresh memory cost a CPU more than the arithmetic.
        return torch.sub(w, torch.clamp(w, low, threshold, out=low), out=low)
    threshold = min(threshold, torch.finfo(w.dtype).max)  # clamp refuses a number beyond the range of w
    # w − clamp(w) leaves +0.0, where softshrink leaves −0.0 in its scalar tail.
    return w - w.clamp(-threshold, threshold)


def hard_threshold(w: Tensor, threshold: Step) -> Tensor:
    """`w` where |w| > threshold, and exact zeros elsewhere. The weights that stay are not shrunk.

    It is argmin_u ½(u − w)² + ½threshold²·(u ≠ 0) at each entry. At |w| = threshold there are two minimizers, and it
    takes 0.

    Args:
        w: real or complex weights of any shape.
        threshold: a number ≥ 0, or a real tensor ≥ 0 that broadcasts against `w`. It is not validated.
    Returns:
        A new tensor of `w`'s shape. A NaN in `w` stays a NaN where it is.
    Source: Donoho and Johnstone, 1994; Blumensath and Davies, 2008.

    >>> hard_threshold(torch.tensor([2.0, -0.25, 0.5]), 0.5)
    tensor([2., 0., 0.])
    """
    return w.masked_fill(w.abs() <= in_range(threshold, w), 0.0)


def firm_threshold(w: Tensor, low: Step, high: Step) -> Tensor:
    """0 where |w| ≤ low, `w` where |w| > high, and the line sign(w)·(|w| − low)·high/(high − low) between them.

    It is the soft threshold just above `low`, and shrinks nothing beyond `high`. Where high ≤ low it is the hard
    threshold at `low`.

    Args:
        w: real or complex weights of any shape.
        low, high: numbers ≥ 0, or real tensors ≥ 0 that broadcast against `w`. They are not validated.
    Returns:
        A new tensor of `w`'s shape. A NaN in `w` stays a NaN where it is. Between `low` and `high` the slope
        high/(high − low) multiplies the rounding errors of `w` and `low`.
    Source: Gao and Bruce, 1997.

    >>> firm_threshold(torch.tensor([3.0, -1.5, 0.5]), low=1.0, high=2.0)
    tensor([ 3., -1.,  0.])
    """
    low, high = in_range(low, w), in_range(high, w)
    gap = high - low
    rises = gap > 0
    stretch = 1 + choose(rises, low / choose(rises, gap, 1.0), 0.0)  # high/gap, and exactly 1 where low is 0
    return torch.where(w.abs() > choose(rises, high, low), w, soft_threshold(w, low) * stretch)


def group_soft_threshold(w: Tensor, threshold: Step, dim: int | Sequence[int]) -> Tensor:
    """argmin_u ½Σ|u − w|²/threshold + ‖u‖₂ over each group: a whole group of exact zeros where ‖w/threshold‖₂ ≤ 1.

    If the threshold t is one number per group, it is w·max(1 − t/‖w‖₂, 0). If t differs within a group (the diagonal
    metric of a step for each weight), it is w·r/(r + t), where r = ‖u‖₂ is the root of Σ|w|²/(r + t)² = 1, found for
    all groups at once in a fixed number of iterations. An entry with threshold 0 does not move, but counts in the
    norm. Complex weights keep their phase.

    Args:
        w: real or complex weights of any shape.
        threshold: a number ≥ 0, or a real tensor ≥ 0 that broadcasts against `w`: step·λ. It is not validated.
        dim: the dimension or dimensions that each group spans.
    Returns:
        A new tensor of `w`'s shape. A NaN or infinity in `w` makes its whole group NaN. Every entry has an error of a
        few roundings of ‖w‖₂ at most, also where the thresholds of a group spread over eight powers of ten.
    Source: Yuan and Lin, 2006, for one number per group; Moré and Sorensen, 1983, for the root.

    >>> group_soft_threshold(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0, dim=1)
    tensor([[2.4000, 3.2000],
            [0.0000, 0.0000]])
    >>> group_soft_threshold(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 5.0]]), dim=1)
    tensor([[3.0000, 1.6220]])
    """
    dims = tuple(d % w.dim() for d in ([dim] if isinstance(dim, int) else dim))
    varies = False
    if isinstance(threshold, Tensor):
        missing = w.dim() - threshold.dim()
        varies = any(d >= missing and threshold.shape[d - missing] > 1 for d in dims)
    return w.clone() if w.numel() == 0 else shared_group_soft_threshold(w, threshold, dims, varies, ALONE)


def shared_group_soft_threshold(
    w: Tensor, threshold: Step, dims: tuple[int, ...], varies: bool, peers: ReduceGroup
) -> Tensor:
    """`group_soft_threshold` of groups that other processes, the `peers`, have further entries of.

    Args:
        varies: whether the threshold differs within groups, in any process: all of them must take the same way.
    Returns:
        As in `group_soft_threshold`; no graph leads to the entries of other processes.

    >>> shared_group_soft_threshold(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0, (1,), False, ALONE)
    tensor([[2.4000, 3.2000],
            [0.0000, 0.0000]])
    """
    modulus = w.abs()
    if not isinstance(threshold, Tensor):
        top = torch.finfo(w.dtype).max
        threshold = torch.full((), min(threshold, top), dtype=modulus.dtype, device=w.device)
    # With this scale no square over- or underflows where it matters. Peers take the threshold for it, which spares an
    # exchange of the largest entry: a norm that is infinite beside it keeps the weights, one that vanishes zeroes them.
    scale = peers.max(_largest(modulus.detach(), dims)) if peers.alone or varies else threshold
    scale = torch.where(scale == 0, 1.0, scale)
    kept = (_kept_in_diagonal_metric if varies else _kept)(modulus.div_(scale), threshold / scale, dims, peers)
    return (w * kept).add_(0.0)  # adding 0.0 turns -0.0 into 0.0


def _kept(modulus: Tensor, threshold: Tensor, dim: tuple[int, ...], peers: ReduceGroup) -> Tensor:
    """u/w for one threshold per group."""
    norm = peers.norms(modulus, dim)
    return (1 - threshold / torch.where(norm == 0, 1.0, norm)).clamp(min=0)


def _largest(modulus: Tensor, dim: tuple[int, ...]) -> Tensor:
    """The maximum over these dimensions, and 0 if there is no entry."""
    if modulus.numel():
        return modulus.amax(dim, keepdim=True)
    return modulus.new_zeros([1 if d in dim else size for d, size in enumerate(modulus.shape)])


BISECTIONS, NEWTON_STEPS = 4, 6
"""The error is then two roundings, in float32 and float64, for the worst metrics that a search found among spreads of
up to 1e8. Newton's method alone would need 14 steps."""


def _kept_in_diagonal_metric(modulus: Tensor, threshold: Tensor, dim: tuple[int, ...], peers: ReduceGroup) -> Tensor:
    """u/w = r/(r + t) with ‖w/(r + t)‖ = 1.

    1/‖w/(r + t)‖ is concave and increasing in r, so Newton's method on it rises to the root from the left and never
    passes it, wherever it starts. Bisection of log r comes first, so that Newton need not cross all scales of t.
    """
    threshold = threshold.expand(modulus.shape)
    tiny = torch.finfo(modulus.dtype).tiny

    def newton(radius: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """‖w/(r + t)‖ and Newton's next r, a lower bound of the root; both are computed in the buffers `a` and `b`."""
        inverse = torch.reciprocal(torch.add(radius + tiny, threshold, out=a), out=a)  # tiny: 0/0 never arises
        part = torch.mul(modulus, inverse, out=b)
        squares = torch.mul(part, part, out=b)
        square = squares.sum(dim, keepdim=True)
        square, slope = peers.sums(square, torch.mul(squares, inverse, out=b).sum(dim, keepdim=True))
        square, slope = torch.where(square == 0, 1.0, square), torch.where(slope == 0, 1.0, slope)
        norm = square.sqrt()
        return norm, radius + (norm - 1) * square / slope

    with torch.no_grad():
        # ‖u‖ is at least the norm of the soft threshold; from there on every |w|/(r + t) is at most 1.
        above = (modulus - threshold).relu_()
        low = above.mul_(above).sum(dim, keepdim=True)
        # Two buffers for all steps: page faults of fresh memory cost a CPU more than the arithmetic.
        # vmap cannot write into given memory.
        a, b = (None, None) if is_transformed() else (above, torch.empty_like(above))
        low, high = peers.sums(low, torch.mul(modulus, modulus, out=b).sum(dim, keepdim=True))
        low, high = low.sqrt(), high.sqrt()
        norm, binding = newton(low, a, b)
        zero = (low == 0) & (norm <= 1)
        low = torch.maximum(low, binding)
        for _ in range(BISECTIONS):
            middle = (low * high).sqrt()
            norm, binding = newton(middle, a, b)
            low, high = torch.maximum(low, binding), torch.where(norm < 1, middle, high)
        for _ in range(NEWTON_STEPS - 1):
            low = newton(low, a, b)[1]
        radius = torch.where(zero, 1.0, low)
    if not (torch.is_grad_enabled() and (modulus.requires_grad or threshold.requires_grad)):
        radius = newton(radius, a, b)[1]
        return torch.div(radius, torch.add(radius, threshold, out=a), out=a).masked_fill_(zero, 0.0)
    # With a graph the last step is the implicit function theorem.
    radius = newton(radius)[1]
    return torch.where(zero, 0.0, radius / (radius + threshold))


# ---------------------------------------------------------------------- for penalties


def in_range(number: Step, w: Tensor) -> Step:
    """`number`, at most the largest number of `w`'s dtype: torch refuses to compare with larger ones."""
    return number if isinstance(number, Tensor) else min(number, torch.finfo(w.dtype).max)


def choose(condition: bool | Tensor, a: Step, b: Step) -> Step:
    """`a` where the condition holds, else `b`: for numbers, and for each entry of tensors."""
    if isinstance(condition, Tensor):
        return torch.where(condition, a, b)
    return a if condition else b


def geometric_mean(a: float, b: Step) -> Step:
    """√(a·b), which overflows nowhere."""
    root: Step = a**0.5 * b**0.5
    return root
