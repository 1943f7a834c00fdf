"""Shards: the part of a weight that a process has, and the sums over the processes that share it."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class ReduceGroup:
    """The processes that have parts of a sum, by the process groups over which it is reduced; none: this one alone.

    >>> ALONE.sum(torch.tensor([1.0, 2.0]))
    tensor([1., 2.])
    """

    groups: tuple[Any, ...] = ()

    def sum(self, x: Tensor) -> Tensor:
        """Σ over the processes, on each of them; a new tensor, or `x` where there is nothing to add.

        All processes go on with the same sum, so each has the whole slope of its own part: the gradient is not reduced.
        """
        return _Sum.apply(x, self) if self.groups else x  # type: ignore[no-any-return]

    def sums(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """`sum` of two tensors of one shape, in one exchange."""
        if not self.groups:
            return a, b
        a, b = self.sum(torch.stack([a, b]))
        return a, b

    def max(self, x: Tensor) -> Tensor:
        """The maximum over the processes, on each of them, without a graph. It may drop a NaN."""
        return _reduced(x, self.groups, torch.distributed.ReduceOp.MAX) if self.groups else x

    def norms(self, w: Tensor, dim: tuple[int, ...]) -> Tensor:
        """‖w‖₂ along dimensions of the whole weight of which each process has a part. Its gradient at zero is 0."""
        if not self.groups:
            return torch.linalg.vector_norm(w, dim=dim, keepdim=True)
        return _Norms.apply(w, dim, self)  # type: ignore[no-any-return]

    def once(self, x: Tensor) -> Tensor:
        """`x`, which all of them have, as the part of one of them: it counts once in `sum`, with its slope on all."""
        first = all(torch.distributed.get_rank(group) == 0 for group in self.groups)
        return x if first else _Nothing.apply(x)  # type: ignore[no-any-return]


ALONE = ReduceGroup()


@dataclass(frozen=True, eq=False)
class ShardLayout:
    """How a weight is divided among processes.

    Attributes:
        shape: of the whole weight.
        mesh, placements: those of its DTensor.
    """

    shape: torch.Size
    mesh: Any
    placements: tuple[Any, ...]

    @property
    def peers(self) -> ReduceGroup:
        """The processes that have the other parts."""
        return self.across(range(len(self.shape)))

    def across(self, dims: Collection[int]) -> ReduceGroup:
        """The processes that have other parts along these dimensions."""
        cut = [i for i, placement in enumerate(self.placements) if _dim(placement) in dims]
        return ReduceGroup(tuple(self.mesh.get_group(i) for i in cut))

    def part(self, x: Tensor) -> Tensor:
        """This process's part of a tensor that broadcasts against the whole weight, or that is divided as it is."""
        if is_sharded(x):
            x = x if _placed(x, self) else x.redistribute(self.mesh, self.placements)  # type: ignore[attr-defined]
            return local_part(x)
        from torch.distributed.tensor import DTensor, Replicate

        missing = len(self.shape) - x.dim()
        whole = [dim is None or dim < missing or x.shape[dim - missing] == 1 for dim in map(_dim, self.placements)]
        if all(whole):
            return x
        everywhere = [Replicate()] * len(self.placements)
        placements = [
            place if keep else _moved(placement, missing)
            for keep, place, placement in zip(whole, everywhere, self.placements, strict=True)
        ]
        # What every process has needs no messages to be divided.
        spread = DTensor.from_local(x, self.mesh, everywhere, run_check=False)
        return spread.redistribute(self.mesh, placements).to_local()

    def whole(self, x: Tensor) -> Tensor:
        """The sharded tensor of which each process gives its part, divided as the weight is."""
        from torch.distributed.tensor import DTensor

        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(x, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride)  # type: ignore[no-any-return]


def shard_layout(w: Tensor) -> ShardLayout | None:
    """How `w` is divided among processes; None where this process has all of it.

    Raises:
        ValueError: each process has a summand of it.
    """
    if not is_sharded(w):
        return None
    placements = w.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"weights with the placements {tuple(placements)} are a sum that is still to be taken over the processes; "
            "call .redistribute() first, as weights are sharded or replicated"
        )
    return ShardLayout(w.shape, w.device_mesh, tuple(placements))  # type: ignore[attr-defined]


def laid_out_as(x: Tensor, w: Tensor) -> Tensor:
    """`x` on the device of `w`, and divided among the processes as `w` is: a tensor of its shape.

    From a sharded `x` to other shards, or to none, it is a collective.
    """
    shard = shard_layout(w)
    if shard is None:
        return unsharded(x).to(w.device)
    if is_sharded(x) and _placed(x, shard) and x.device == w.device:
        return x
    if is_sharded(x) and x.device_mesh != shard.mesh:  # type: ignore[attr-defined]
        x = unsharded(x)
    return shard.whole(shard.part(x.to(w.device)).contiguous())


def is_laid_out_as(x: Tensor, w: Tensor) -> bool:
    """`x` lies where `w` does."""
    if x.device != w.device or is_sharded(x) != is_sharded(w):
        return False
    shard = shard_layout(w)
    return shard is None or _placed(x, shard)


def fsdp_parameters(model: nn.Module) -> dict[tuple[int, str], Any]:
    """By `id` of its module and its name, what `fully_shard` keeps of each parameter that it exchanges.

    During forward and backward it puts the whole parameter in the place of the shard that the optimizer holds; for
    some modules, the outermost one among them, it stays there from the forward on.

    Raises:
        ValueError: the model is wrapped in FullyShardedDataParallel, the predecessor of `fully_shard`.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    found = {}
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                "FullyShardedDataParallel flattens weights, so that a process has neither rows nor columns of them; "
                "shard the model with torch.distributed.fsdp.fully_shard instead"
            )
        find = getattr(module, "_get_fsdp_state", None)
        if find is None:
            continue
        state = find()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for held in (held for group in groups if group is not None for held in group.fsdp_params):
            info = held._module_info
            owners = zip((info.module, *info.shared_modules), (info.param_name, *info.shared_param_names), strict=True)
            found.update({(id(owner), name): held for owner, name in owners})
    return found


def reshard(model: nn.Module) -> None:
    """Lets go of the whole weights that a forward pass without a backward has left in a model of `fully_shard`."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            module.reshard()  # type: ignore[operator]


def at_rest(parameter: Tensor, held: Any) -> Tensor:
    """The shard that the optimizer holds, where `fully_shard` has put another tensor in its place for now."""
    instead = (getattr(held, "_unsharded_param", None), getattr(held, "_sharded_post_forward_param", None))
    return held.sharded_param if any(parameter is other for other in instead) else parameter  # type: ignore[no-any-return]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: ReduceGroup) -> Tensor:
        return _reduced(x, peers.groups, torch.distributed.ReduceOp.SUM)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope, None


class _Norms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, dim: tuple[int, ...], peers: ReduceGroup) -> Tensor:
        own = torch.linalg.vector_norm(w, dim=dim, keepdim=True)
        norms = peers.sum(own.square()).sqrt()
        ctx.save_for_backward(w, norms)
        return norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        w, norms = ctx.saved_tensors
        return slope * w / torch.where(norms == 0, 1.0, norms), None, None


class _Nothing(torch.autograd.Function):
    """0, with the slope of `x`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope


def _reduced(x: Tensor, groups: tuple[Any, ...], operation: Any) -> Tensor:
    x = x.detach().clone(memory_format=torch.contiguous_format)
    for group in groups:
        torch.distributed.all_reduce(x, operation, group=group)
    return x


def _dim(placement: Any) -> int | None:
    """The dimension that a mesh dimension divides; None where it repeats the weight."""
    return getattr(placement, "dim", None)


def _moved(placement: Any, missing: int) -> Any:
    """The placement for a tensor that lacks so many leading dimensions."""
    from torch.distributed.tensor import Shard

    return placement if missing == 0 else Shard(placement.dim - missing)


def _placed(x: Tensor, shard: ShardLayout) -> bool:
    return x.device_mesh == shard.mesh and tuple(x.placements) == shard.placements  # type: ignore[attr-defined]


def is_sharded(w: Tensor) -> bool:
    """Each process has a shard of it (a DTensor)."""
    return hasattr(w, "full_tensor")


def local_part(x: Tensor) -> Tensor:
    """What this process has of it: all, where it is not sharded. Autograd follows."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined, no-any-return]


def unsharded(w: Tensor) -> Tensor:
    """All of `w` where it is sharded: a collective, so every process has to come here."""
    return w.full_tensor() if is_sharded(w) else w  # type: ignore[attr-defined]
