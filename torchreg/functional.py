"""Proximal maps as functions: tensors in, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from torchreg.checks import Step


def soft_threshold(w: Tensor, threshold: Step) -> Tensor:
    """sign(w)·max(|w| − threshold, 0): exact zeros wherever |w| ≤ threshold.

    It is argmin_u ½(u − w)² + threshold·|u| at each entry. Complex weights keep their phase and lose modulus.

    Args:
        w: real or complex weights of any shape.
        threshold: a number ≥ 0, or a real tensor ≥ 0 that broadcasts against `w`. It is not looked at: a
            negative entry gives a meaningless result, not an error.
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
        if torch.is_grad_enabled() or low.shape != w.shape or low.dtype != w.dtype:
            return w - torch.clamp(w, low, threshold)
        # In one buffer: a CPU pays for fresh memory in page faults, more than for the arithmetic.
        return torch.sub(w, torch.clamp(w, low, threshold, out=low), out=low)
    threshold = min(threshold, torch.finfo(w.dtype).max)  # clamp refuses a number beyond the range of w
    # w − clamp(w) leaves +0.0, where softshrink leaves −0.0 in its scalar tail.
    return w - w.clamp(-threshold, threshold)
