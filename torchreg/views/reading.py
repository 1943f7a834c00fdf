"""Reading numbers from devices: one wait per device, for any number of tensors."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def read(tensors: Sequence[Tensor]) -> tuple[list[list[float]], float]:
    """The entries of each tensor, and the seconds spent waiting for devices. Whole numbers stay whole numbers.

    >>> read([torch.tensor([1, 2**40]), torch.tensor(0.5)])[0]
    [[1, 1099511627776], [0.5]]
    """
    entries: list[list[float]] = [[] for _ in tensors]
    seconds = 0.0
    by_device: dict[torch.device, list[int]] = {}
    for i, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(i)
    for device, indices in by_device.items():
        flat = [tensors[i].detach().reshape(-1) for i in indices]
        if not synchronizes(device):
            numbers: Iterator[list[float]] = (tensor.tolist() for tensor in flat)
        else:
            start = time.thread_time()
            numbers = _read_at_once(flat)
            seconds += time.thread_time() - start
        for i, values in zip(indices, numbers, strict=True):
            entries[i] = values
    return entries, seconds


def synchronizes(device: torch.device) -> bool:
    """Whether a read waits until the device has finished its work."""
    return device.type != "cpu"


def _read_at_once(tensors: Sequence[Tensor]) -> Iterator[list[float]]:
    """The entries of 1-d tensors, in one transfer: whole numbers as pairs of 32 bits, then all other numbers."""
    integers = [tensor for tensor in tensors if tensor.dtype == torch.int64]
    floats = [tensor for tensor in tensors if tensor.dtype != torch.int64]
    # float64 only if a tensor has it already, since some devices do not support it.
    wide = torch.float64 if any(tensor.dtype == torch.float64 for tensor in floats) else torch.float32
    parts = [torch.cat(integers).view(torch.int32)] if integers else []
    parts += [torch.cat([tensor.to(wide) for tensor in floats]).view(torch.int32)] if floats else []
    packed = torch.cat(parts).cpu()
    end = 2 * sum(len(tensor) for tensor in integers)
    whole_numbers, numbers = iter(packed[:end].view(torch.int64).tolist()), iter(packed[end:].view(wide).tolist())
    return (
        list(itertools.islice(whole_numbers if tensor.dtype == torch.int64 else numbers, len(tensor)))
        for tensor in tensors
    )
