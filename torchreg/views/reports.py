"""Reports: the sparsity of a checkpoint, layer by layer, and what its zeros would save."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchreg._tables import printable
from torchreg._tensors import widened
from torchreg.binding.selection import kind_by_name
from torchreg.inspection.zero_counts import LayerSparsity, Sparsity, sparsity_table, zero_counts
from torchreg.views.checkpoints import Checkpoint

_INDEX = 4  # bytes of an int32
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_PACKED = getattr(torch, "float4_e2m1fn_x2", None)  # two weights in a byte: torch computes nothing on them
FORMAT = "weights as CSR (their values, int32 indices) where that is smaller, the rest as it is, no pruning masks"


@dataclass(frozen=True)
class Weight:
    """What a report tells of one weight.

    Attributes:
        layer: its zeros.
        dtype: as it is stored.
        nan, inf: how many of its entries are NaN, or infinite.
        near_zero: how many are at most the threshold, the exact zeros among them.
        dense, sparse: its bytes as it is stored, and as CSR if that is smaller.
        ties: its other names.
    """

    layer: LayerSparsity
    dtype: str
    nan: int
    inf: int
    near_zero: int
    dense: int
    sparse: int
    ties: tuple[str, ...]


@dataclass(frozen=True)
class Rest:
    """Tensors of one kind that are no weights: how many, their entries, bytes, NaN and infinities."""

    tensors: int = 0
    entries: int = 0
    bytes: int = 0
    nan: int = 0
    inf: int = 0


@dataclass(frozen=True)
class Report:
    """The sparsity of a checkpoint; `print` shows it.

    Attributes:
        checkpoint: what was read.
        threshold: up to which |w| counts as near zero; None does not count them.
        weights: the weights, in the file's order.
        rest: what else is stored, by the reason why it is no weight.
    """

    checkpoint: Checkpoint
    threshold: float | None
    weights: tuple[Weight, ...]
    rest: dict[str, Rest]

    @property
    def sparsity(self) -> Sparsity:
        """The zeros, total and by layer."""
        return Sparsity(tuple(weight.layer for weight in self.weights))

    @property
    def near_zero(self) -> int:
        """How many weights are at most the threshold."""
        return sum(weight.near_zero for weight in self.weights)

    @property
    def dense(self) -> int:
        """The bytes of all tensors as they are stored."""
        return sum(weight.dense for weight in self.weights) + sum(rest.bytes for rest in self.rest.values())

    @property
    def sparse(self) -> int:
        """The bytes of all tensors, each weight as CSR where that is smaller; masks are not needed any more."""
        kept = sum(rest.bytes for kind, rest in self.rest.items() if kind != "pruning mask")
        return sum(weight.sparse for weight in self.weights) + kept

    @property
    def ratio(self) -> float:
        """Pretrain over sparse bytes; 1 where there is nothing."""
        return self.dense / self.sparse if self.sparse else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        total, parts = self.sparsity.to_dict(), self._parts()
        layers = total.pop("layers")
        for weight in self.weights:
            layers[weight.layer.name] |= {
                "dtype": weight.dtype,
                "nan": weight.nan,
                "inf": weight.inf,
                **({} if self.threshold is None else {"near_zero": weight.near_zero}),
                "dense_bytes": weight.dense,
                "sparse_bytes": weight.sparse,
                "ties": list(weight.ties),
            }
        return {
            "file": self.checkpoint.path,
            "format": self.checkpoint.format,
            "file_bytes": self.checkpoint.size,
            "key": self.checkpoint.key or None,
            **total,
            "nan": sum(part.nan for _, part in parts),
            "inf": sum(part.inf for _, part in parts),
            "near_zero_threshold": self.threshold,
            **({} if self.threshold is None else {"near_zero": self.near_zero}),
            "dense_bytes": self.dense,
            "sparse_bytes": self.sparse,
            "ratio": self.ratio,
            "sparse_format": FORMAT,
            "layers": layers,
            "rest": {kind: vars(rest) for kind, rest in self.rest.items()},
            "skipped": list(self.checkpoint.skipped),
        }

    def __str__(self) -> str:
        where = f', state dict under "{printable(self.checkpoint.key)}"' if self.checkpoint.key else ""
        lines = [
            f"{printable(self.checkpoint.path)}: {self.checkpoint.format}, {size(self.checkpoint.size)}{where}",
            "",
        ]
        columns = {"dtype": [*[weight.dtype for weight in self.weights], ""]}
        if self.threshold is not None:
            near = [weight.near_zero / weight.layer.weights for weight in self.weights]
            near.append(self.near_zero / max(1, self.sparsity.weights))
            columns[f"|w| ≤ {self.threshold:g}"] = [f"{share:.2%}" for share in near]
        table = sparsity_table(self.sparsity, **columns) if self.weights else "no weight of two or more dimensions"
        lines += [table, ""]
        if self.rest:
            count, entries = (sum(getattr(r, key) for r in self.rest.values()) for key in ("tensors", "entries"))
            kinds = ", ".join(f"{rest.tensors} {kind}" for kind, rest in self.rest.items())
            used = size(sum(rest.bytes for rest in self.rest.values()))
            lines.append(f"the rest: {count} tensor{'s' * (count != 1)}, {entries:,} entries, {used} ({kinds})")
        lines.append(f"size: {size(self.dense)} dense, {size(self.sparse)} sparse, {self.ratio:.2f} to 1")
        lines.append(f"sparse: {FORMAT}")
        lines += self._notes()
        return "\n".join(lines)

    def _parts(self) -> list[tuple[str, Weight | Rest]]:
        return [*((weight.layer.name, weight) for weight in self.weights), *self.rest.items()]

    def _notes(self) -> list[str]:
        notes = [
            "tied: " + " = ".join(map(printable, (weight.layer.name, *weight.ties))) + ", counted once"
            for weight in self.weights
            if weight.ties
        ]
        for name, part in self._parts():
            if part.nan or part.inf:
                where = printable(name)
                notes.append(f"not finite: {where} has {part.nan:,} NaN and {part.inf:,} infinite entries")
        if skipped := self.checkpoint.skipped:
            names = ", ".join(map(printable, skipped[:8])) + (", ..." if len(skipped) > 8 else "")
            notes.append(f"left out, no tensors: {names}")
        return notes


def report(checkpoint: Checkpoint, threshold: float | None = None) -> Report:
    """Counts the zeros of a checkpoint, tensor by tensor.

    A weight is floating, complex or quantized, has two or more dimensions, and no name of a bias or an embedding. The
    pairs of torch.nn.utils.prune, `weight_orig` and `weight_mask`, count as the weight that they make.

    Args:
        checkpoint: what `checkpoints.read` found.
        threshold: counts |w| ≤ threshold too.
    """
    tensors = checkpoint.tensors
    masks = {name: mask for name in tensors if (mask := _mask(name, tensors)) is not None}
    masked = {f"{name.removesuffix('_orig')}_mask" for name in masks}
    weights: list[Weight] = []
    rest: dict[str, Rest] = {}
    for name, tensor in tensors.items():  # one at a time: what is mapped from the file need not fit in memory at once
        plain = name.removesuffix("_orig") if name in masks else name
        kind = "pruning mask" if name in masked else _kind(plain.rpartition(".")[2], tensor)
        if kind:
            rest[kind] = _added(rest.get(kind, Rest()), tensor)
        else:
            weights.append(_weight(plain, tensor, masks.get(name), threshold, checkpoint.ties.get(name, ())))
    return Report(checkpoint, threshold, tuple(weights), rest)


def size(count: float) -> str:
    """Bytes as a reader takes them in.

    >>> size(512), size(1536), size(3 * 1024**3)
    ('512 B', '1.50 KiB', '3.00 GiB')
    """
    if count < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log(count, 1024)), 4)
    return f"{count / 1024**power:,.2f} {'KMGT'[power - 1]}iB"


def _mask(name: str, tensors: dict[str, Tensor]) -> Tensor | None:
    """The mask of torch.nn.utils.prune that goes with `name`, if there is one."""
    plain, tensor = name.removesuffix("_orig"), tensors[name]
    mask = tensors.get(f"{plain}_mask")
    if plain == name or plain in tensors or mask is None:
        return None
    return mask if (mask.shape, mask.dtype) == (tensor.shape, tensor.dtype) else None


def _kind(attribute: str, tensor: Tensor) -> str:
    """Why `tensor` is no weight, or ""."""
    if attribute in _STATISTICS:
        return "norm statistics"
    if tensor.dtype == _PACKED:
        return "packed type"
    if not tensor.numel():
        return "empty"
    if _repeats(tensor):
        return "repeated view"
    return kind_by_name(attribute, tensor.dequantize() if tensor.is_quantized else tensor)


def _repeats(tensor: Tensor) -> bool:
    """It shows a smaller storage many times over, as expand() does: its entries may be more than any memory holds."""
    return _bytes(tensor) > tensor.untyped_storage().nbytes()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _widened(tensor: Tensor) -> Tensor:
    """In a type that every operation knows."""
    if tensor.is_quantized:
        return tensor.dequantize()
    narrow = tensor.is_floating_point() and tensor.element_size() < 2
    return tensor.float() if narrow else tensor


def _weight(name: str, tensor: Tensor, mask: Tensor | None, threshold: float | None, ties: Sequence[str]) -> Weight:
    values = _widened(tensor)
    if mask is not None:
        values = values * _widened(mask)
    alive = values != 0
    layer = LayerSparsity(name, tuple(tensor.shape), tensor.numel(), *zero_counts(alive).tolist())
    nan, inf = _not_finite(values)
    left, rows = layer.weights - layer.zeros, tensor.shape[0]
    return Weight(
        layer=layer,
        dtype=str(tensor.dtype).removeprefix("torch."),
        nan=nan,
        inf=inf,
        near_zero=0 if threshold is None else int((widened(values).abs() <= threshold).count_nonzero()),
        dense=_bytes(tensor),
        sparse=min(_bytes(tensor), left * (tensor.element_size() + _INDEX) + (rows + 1) * _INDEX),
        ties=tuple(ties),
    )


def _not_finite(values: Tensor) -> tuple[int, int]:
    """How many are NaN, and how many infinite."""
    if values.numel() and not values.is_complex() and all(map(math.isfinite, map(float, values.aminmax()))):
        return 0, 0  # a NaN is the least and the greatest: one pass for nearly every tensor
    return int(values.isnan().count_nonzero()), int(values.isinf().count_nonzero())


def _added(rest: Rest, tensor: Tensor) -> Rest:
    nan = inf = 0
    if not _repeats(tensor) and tensor.dtype != _PACKED and (tensor.is_floating_point() or tensor.is_complex()):
        nan, inf = _not_finite(_widened(tensor))
    stored = min(_bytes(tensor), tensor.untyped_storage().nbytes())
    return Rest(rest.tensors + 1, rest.entries + tensor.numel(), rest.bytes + stored, rest.nan + nan, rest.inf + inf)
