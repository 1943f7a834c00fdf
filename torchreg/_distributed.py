"""Shards: the part of a weight that a process has, and sums over the processes that share it."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchreg._tensors import ALONE, WHOLE, Layout, ReduceGroup, Step
from torchreg._tensors import is_sharded as is_sharded
from torchreg._tensors import local_part as local_part


@dataclass(frozen=True)
class ProcessGroups(ReduceGroup):
    """Several processes that have parts of a sum, as the process groups over which it is reduced one after another."""

    groups: tuple[Any, ...]

    alone = False

    def sum(self, x: Tensor) -> Tensor:
        return _Sum.apply(x, self.groups)  # type: ignore[no-any-return]

    def sums(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.sum(torch.stack([a, b]))
        return a, b

    def max(self, x: Tensor) -> Tensor:
        return _reduced(x, self.groups, torch.distributed.ReduceOp.MAX)

    def norms(self, w: Tensor, dim: tuple[int, ...]) -> Tensor:
        return _Norms.apply(w, dim, self)  # type: ignore[no-any-return]

    def once(self, x: Tensor) -> Tensor:
        first = all(torch.distributed.get_rank(group) == 0 for group in self.groups)
        return x if first else _ZeroWithSlope.apply(x)  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class ShardLayout(Layout):
    """The layout of a weight that is divided among processes.

    Attributes:
        shape: the shape of the whole weight.
        mesh, placements: those of its DTensor.
    """

    shape: torch.Size
    mesh: Any
    placements: tuple[Any, ...]

    divided = True

    @property
    def peers(self) -> ReduceGroup:
        return self.across(range(len(self.shape)))

    def across(self, dims: Collection[int]) -> ReduceGroup:
        cut = [i for i, placement in enumerate(self.placements) if _divided_dim(placement) in dims]
        return ProcessGroups(tuple(self.mesh.get_group(i) for i in cut)) if cut else ALONE

    def whole_shape(self, part: Tensor) -> torch.Size:
        return self.shape

    def part(self, x: Tensor) -> Tensor:
        if is_sharded(x):
            x = x if _placed(x, self) else x.redistribute(self.mesh, self.placements)  # type: ignore[attr-defined]
            return local_part(x)
        from torch.distributed.tensor import DTensor, Replicate

        missing = len(self.shape) - x.dim()
        dims = map(_divided_dim, self.placements)
        uncut = [dim is None or dim < missing or x.shape[dim - missing] == 1 for dim in dims]
        if all(uncut):
            return x
        everywhere = [Replicate()] * len(self.placements)
        placements = [
            replicated if keep else _without_leading_dims(placement, missing)
            for keep, replicated, placement in zip(uncut, everywhere, self.placements, strict=True)
        ]
        # Every process has all of `x`, so dividing it needs no messages.
        spread = DTensor.from_local(x, self.mesh, everywhere, run_check=False)
        return spread.redistribute(self.mesh, placements).to_local()

    def step_of_part(self, step: Step, part: Tensor) -> Step:
        if not isinstance(step, Tensor) or (step.shape == part.shape and not is_sharded(step)):
            return step
        return self.part(step)

    def whole(self, part: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(  # type: ignore[no-any-return]
            part, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride
        )


def layout_of(w: Tensor) -> Layout:
    """How `w` lies over processes: a `ShardLayout` for a DTensor, `WHOLE` for any other tensor.

    Raises:
        ValueError: `w` is a sum of which each process has a summand.
    """
    if not is_sharded(w):
        return WHOLE
    placements = w.placements  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise ValueError(
            f"weights with the placements {tuple(placements)} are a sum that is still to be taken over the processes; "
            "call .redistribute() first, as weights are sharded or replicated"
        )
    return ShardLayout(w.shape, w.device_mesh, tuple(placements))  # type: ignore[attr-defined]


def laid_out_as(x: Tensor, w: Tensor) -> Tensor:
    """`x`, a tensor of `w`'s shape, on the device of `w` and divided among the processes as `w` is.

    It is a collective if `x` is sharded in another way than `w`.
    """
    layout = layout_of(w)
    if not isinstance(layout, ShardLayout):
        return unsharded(x).to(w.device)
    if is_sharded(x) and _placed(x, layout) and x.device == w.device:
        return x
    if is_sharded(x) and x.device_mesh != layout.mesh:  # type: ignore[attr-defined]
        x = unsharded(x)
    return layout.whole(layout.part(x.to(w.device)).contiguous())


def is_laid_out_as(x: Tensor, w: Tensor) -> bool:
    """Whether `x` is on the device of `w`, and divided among the processes as `w` is."""
    if x.device != w.device or is_sharded(x) != is_sharded(w):
        return False
    layout = layout_of(w)
    return not isinstance(layout, ShardLayout) or _placed(x, layout)


def unsharded(w: Tensor) -> Tensor:
    """All of `w`. If `w` is sharded this is a collective: every process must call it."""
    return w.full_tensor() if is_sharded(w) else w  # type: ignore[attr-defined]


def fsdp_parameters(model: nn.Module) -> dict[tuple[int, str], Any]:
    """The record that `fully_shard` keeps of each parameter it exchanges, by the `id` of its module and its name.

    During forward and backward `fully_shard` puts the whole parameter in the place of the shard that the optimizer
    holds. In some modules, such as the outermost one, the whole parameter stays there after the forward.

    Raises:
        ValueError: the model is wrapped in FullyShardedDataParallel, the predecessor of `fully_shard`.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    records = {}
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(
                "FullyShardedDataParallel flattens weights, so that a process has neither rows nor columns of them; "
                "shard the model with torch.distributed.fsdp.fully_shard instead"
            )
        get_state = getattr(module, "_get_fsdp_state", None)
        if get_state is None:
            continue
        state = get_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for record in (record for group in groups if group is not None for record in group.fsdp_params):
            info = record._module_info
            owners = zip((info.module, *info.shared_modules), (info.param_name, *info.shared_param_names), strict=True)
            records.update({(id(owner), name): record for owner, name in owners})
    return records


def reshard(model: nn.Module) -> None:
    """Frees the whole weights that a forward pass without a backward has left in a model of `fully_shard`."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            module.reshard()  # type: ignore[operator]


def at_rest(parameter: Tensor, record: Any) -> Tensor:
    """The shard that the optimizer holds, also while `fully_shard` has another tensor in its place."""
    substitutes = (getattr(record, "_unsharded_param", None), getattr(record, "_sharded_post_forward_param", None))
    if any(parameter is other for other in substitutes):
        return record.sharded_param  # type: ignore[no-any-return]
    return parameter


class _Sum(torch.autograd.Function):
    """The sum over the processes. Each goes on with the whole sum, so the slope passes through unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: tuple[Any, ...]) -> Tensor:
        return _reduced(x, groups, torch.distributed.ReduceOp.SUM)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope, None


class _Norms(torch.autograd.Function):
    """‖w‖₂ along dimensions of which each process has a part."""

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


class _ZeroWithSlope(torch.autograd.Function):
    """0, through which the slope passes to `x` unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope


def _reduced(x: Tensor, groups: tuple[Any, ...], operation: Any) -> Tensor:
    """A new tensor: `x` reduced over the process groups, one after another."""
    x = x.detach().clone(memory_format=torch.contiguous_format)
    for group in groups:
        torch.distributed.all_reduce(x, operation, group=group)
    return x


def _divided_dim(placement: Any) -> int | None:
    """The dimension of the weight that a dimension of the mesh divides; None if it only repeats the weight."""
    return getattr(placement, "dim", None)


def _without_leading_dims(placement: Any, missing: int) -> Any:
    """The placement of a tensor that lacks the first `missing` dimensions of the weight."""
    from torch.distributed.tensor import Shard

    return placement if missing == 0 else Shard(placement.dim - missing)


def _placed(x: Tensor, layout: ShardLayout) -> bool:
    """Whether a sharded `x` is divided in this way."""
    return x.device_mesh == layout.mesh and tuple(x.placements) == layout.placements  # type: ignore[attr-defined]
