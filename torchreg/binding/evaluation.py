"""Sums of many penalties: those of |w| and w² in one pass over all of their weights, the others one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from torchreg._distributed import layout_of
from torchreg._tensors import ReduceGroup, is_laid_out_like
from torchreg.kernels import l1l2
from torchreg.penalties import Penalty
from torchreg.penalties.coefficients import L1L2

Item = tuple[str, Tensor, Penalty]
"""A key, a weight and its penalty; values are summed by key."""


class Batch(NamedTuple):
    """Weights of one key, dtype and device, which a kernel takes together."""

    weights: list[Tensor]
    penalties: list[L1L2]


def values(items: Iterable[Item]) -> Iterator[tuple[str, Tensor]]:
    """(key, value) of parts that sum to the penalties, and that autograd can follow."""
    whole, parts = _divided(items)
    yield from _values(whole)
    yield from _sharded(parts)


def total(values: list[Tensor], like: Tensor) -> Tensor:
    """The sum of 0-d tensors of any device and dtype; of none, 0 on the device of `like`."""
    if not values:
        return torch.zeros((), device=like.device)
    if len(values) == 1:
        return values[0]
    dtype = torch.float64 if any(value.dtype == torch.float64 for value in values) else torch.float32
    return torch.stack([value.to(values[0].device, dtype) for value in values]).sum()


def _sharded(parts: dict[ReduceGroup, list[Item]]) -> Iterator[tuple[str, Tensor]]:
    """The same of sharded weights: one exchange for all those of a key that are divided among the same processes."""
    for peers, own in parts.items():
        sums: dict[str, list[Tensor]] = {}
        for key, value in _values(own):
            sums.setdefault(key, []).append(value)
        for key, found in sums.items():
            dtype = torch.float64 if any(value.dtype == torch.float64 for value in found) else torch.float32
            yield key, peers.sum(torch.stack([value.to(found[0].device, dtype) for value in found]).sum())


def _values(items: Iterable[Item]) -> Iterator[tuple[str, Tensor]]:
    batches, rest = _batched(items)
    for key, batch in batches:
        yield key, l1l2.value(*batch)
    for key, w, penalty in rest:
        # Not penalty(w): torch.compile of torch 2.8 and older hashes what is called, and fails.
        yield key, penalty.__call__(w)


def _divided(items: Iterable[Item]) -> tuple[list[Item], dict[ReduceGroup, list[Item]]]:
    """Items that this process has whole; and its parts of sharded ones, by the processes that have the other parts."""
    whole: list[Item] = []
    parts: dict[ReduceGroup, list[Item]] = {}
    for key, w, penalty in items:
        layout = layout_of(w)
        if layout.divided:
            parts.setdefault(layout.peers, []).append((key, layout.part(w), penalty.on_part(layout)))
        else:
            whole.append((key, w, penalty))
    return whole, parts


def add_gradients_(items: Iterable[Item]) -> Iterator[tuple[str, Tensor]]:
    """Adds the gradients to `.grad`, as `backward()` of the sum would, and gives the values without a graph."""
    # The caller may well be in no_grad: the gradients are asked for all the same.
    with torch.inference_mode(False), torch.enable_grad():
        whole, parts = _divided(items)
        batches, rest = _batched(whole, into_grad=True)
        ones = [(key, penalty(w)) for key, w, penalty in rest]
        ones += _sharded(parts)
        followed = [value for _, value in ones if value.requires_grad]
        if followed:
            torch.autograd.backward(followed)
    for key, batch in batches:
        yield key, (l1l2.add_gradients_ if batch.weights[0].requires_grad else l1l2.value)(*batch)
    for key, value in ones:
        yield key, value.detach()


def _batched(items: Iterable[Item], into_grad: bool = False) -> tuple[list[tuple[str, Batch]], list[Item]]:
    """Batches of items that a kernel takes, and the other items."""
    batches: dict[tuple[str, torch.dtype, torch.device, bool], Batch] = {}
    rest = []
    available = l1l2.available()
    for item in items:
        key, w, penalty = item
        terms = penalty.coefficients() if available else None
        if terms is None or not l1l2.takes(w, terms.anchor) or (into_grad and not _takes_gradient(w)):
            rest.append(item)
            continue
        # A sum of weights that train and others would give the others a graph.
        weights, penalties = batches.setdefault((key, w.dtype, w.device, w.requires_grad), Batch([], []))
        weights.append(w)
        penalties.append(terms)
    return [(key, batch) for (key, *_), batch in batches.items()], rest


def _takes_gradient(w: Tensor) -> bool:
    """Adding to `.grad` in memory is all that `backward()` would do."""
    if not w.requires_grad:
        return True
    if not w.is_leaf or w._backward_hooks or w._post_accumulate_grad_hooks:
        return False
    return w.grad is None or (is_laid_out_like(w.grad, w) and not w.grad.requires_grad)
