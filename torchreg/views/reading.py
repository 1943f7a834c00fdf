"""Reading numbers off devices: each waits once, however many tensors there are."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def read(tensors: Sequence[Tensor]) -> tuple[list[list[float]], float]:
    """The entries of each tensor, and the seconds that devices took to catch up. Whole numbers come back whole.

    >>> read([torch.tensor([1, 2**40]), torch.tensor(0.5)])[0]
    [[1, 1099511627776], [0.5]]
    """
    found: list[list[float]] = [[] for _ in tensors]
    waited = 0.0
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(i)
    for device, indices in by_device.items():
        chosen = [tensors[i].detach().reshape(-1) for i in indices]
        if not _waits(device):
            numbers: Iterator[list[float]] = (tensor.tolist() for tensor in chosen)
        else:
            before = time.thread_time()
            numbers = _fetched(chosen)
            waited += time.thread_time() - before
        for i, own in zip(indices, numbers, strict=True):
            found[i] = own
    return found, waited


def _waits(device: torch.device) -> bool:
    """Reading it waits for what it was told to do."""
    return device.type != "cpu"


def _fetched(tensors: Sequence[Tensor]) -> Iterator[list[float]]:
    """1-d tensors in one transfer: whole numbers as pairs of 32 bits, the others behind them."""
    whole = [tensor for tensor in tensors if tensor.dtype == torch.int64]
    real = [tensor for tensor in tensors if tensor.dtype != torch.int64]
    # No float64 that is not there already: not every device has it.
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in real) else torch.float32
    parts = [torch.cat(whole).view(torch.int32)] if whole else []
    parts += [torch.cat([tensor.to(wide) for tensor in real]).view(torch.int32)] if real else []
    packed = torch.cat(parts).cpu()
    end = 2 * sum(len(tensor) for tensor in whole)
    integers, floats = iter(packed[:end].view(torch.int64).tolist()), iter(packed[end:].view(wide).tolist())
    return (
        list(itertools.islice(integers if tensor.dtype == torch.int64 else floats, len(tensor))) for tensor in tensors
    )
