"""The sparsity of a checkpoint, layer by layer, and the memory that its zeros would save."""

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
from torchreg.views.report.checkpoint_file import Checkpoint

_INDEX_BYTES = 4  # an index is an int32
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_PACKED = getattr(torch, "float4_e2m1fn_x2", None)  # two weights in one byte: torch has no operations for it
SPARSE_FORMAT = (
    "weights as CSR (their values, int32 indices) where that is smaller, the rest as it is, no pruning masks"
)


@dataclass(frozen=True)
class WeightReport:
    """The zeros and sizes of one weight.

    Attributes:
        layer: its zeros.
        dtype: its dtype in the file.
        nan, inf: the numbers of entries that are NaN and that are infinite.
        near_zero: the number of entries with |w| up to the threshold, exact zeros included.
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
class OtherTensors:
    """The tensors of one kind that are not weights: their number, entries, bytes, NaN and infinities."""

    tensors: int = 0
    entries: int = 0
    bytes: int = 0
    nan: int = 0
    inf: int = 0


@dataclass(frozen=True)
class CheckpointReport:
    """The sparsity of a checkpoint; `print` shows it as a table.

    Attributes:
        checkpoint: the file and its tensors.
        threshold: |w| up to this number counts as near zero; None counts no such weights.
        weights: the weights, in the order of the file.
        others: all other tensors, by the reason why they are not weights.
    """

    checkpoint: Checkpoint
    threshold: float | None
    weights: tuple[WeightReport, ...]
    others: dict[str, OtherTensors]

    @property
    def sparsity(self) -> Sparsity:
        """The zeros, in total and by layer."""
        return Sparsity(tuple(weight.layer for weight in self.weights))

    @property
    def near_zero(self) -> int:
        """The number of weights with |w| up to the threshold."""
        return sum(weight.near_zero for weight in self.weights)

    @property
    def dense(self) -> int:
        """The bytes of all tensors as they are stored."""
        return sum(weight.dense for weight in self.weights) + sum(others.bytes for others in self.others.values())

    @property
    def sparse(self) -> int:
        """The bytes of all tensors, with each weight as CSR where that is smaller, and without pruning masks."""
        n_other = sum(others.bytes for kind, others in self.others.items() if kind != "pruning mask")
        return sum(weight.sparse for weight in self.weights) + n_other

    @property
    def ratio(self) -> float:
        """Dense over sparse bytes; 1 for an empty checkpoint."""
        return self.dense / self.sparse if self.sparse else 1.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers and texts, for JSON."""
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
            "sparse_format": SPARSE_FORMAT,
            "layers": layers,
            "rest": {kind: vars(others) for kind, others in self.others.items()},
            "skipped": list(self.checkpoint.skipped),
        }

    def __str__(self) -> str:
        key = f', state dict under "{printable(self.checkpoint.key)}"' if self.checkpoint.key else ""
        size = size_text(self.checkpoint.size)
        lines = [f"{printable(self.checkpoint.path)}: {self.checkpoint.format}, {size}{key}", ""]
        columns = {"dtype": [*[weight.dtype for weight in self.weights], ""]}
        if self.threshold is not None:
            near = [weight.near_zero / weight.layer.weights for weight in self.weights]
            near.append(self.near_zero / max(1, self.sparsity.weights))
            columns[f"|w| ≤ {self.threshold:g}"] = [f"{share:.2%}" for share in near]
        table = sparsity_table(self.sparsity, **columns) if self.weights else "no weight of two or more dimensions"
        lines += [table, ""]
        if self.others:
            count, entries, size = (
                sum(getattr(others, key) for others in self.others.values()) for key in ("tensors", "entries", "bytes")
            )
            kinds = ", ".join(f"{others.tensors} {kind}" for kind, others in self.others.items())
            tensors = f"{count} tensor{'s' * (count != 1)}"
            lines.append(f"the rest: {tensors}, {entries:,} entries, {size_text(size)} ({kinds})")
        lines.append(f"size: {size_text(self.dense)} dense, {size_text(self.sparse)} sparse, {self.ratio:.2f} to 1")
        lines.append(f"sparse: {SPARSE_FORMAT}")
        lines += self._notes()
        return "\n".join(lines)

    def _parts(self) -> list[tuple[str, WeightReport | OtherTensors]]:
        return [*((weight.layer.name, weight) for weight in self.weights), *self.others.items()]

    def _notes(self) -> list[str]:
        notes = [
            "tied: " + " = ".join(map(printable, (weight.layer.name, *weight.ties))) + ", counted once"
            for weight in self.weights
            if weight.ties
        ]
        for name, part in self._parts():
            if part.nan or part.inf:
                notes.append(f"not finite: {printable(name)} has {part.nan:,} NaN and {part.inf:,} infinite entries")
        if skipped := self.checkpoint.skipped:
            names = ", ".join(map(printable, skipped[:8])) + (", ..." if len(skipped) > 8 else "")
            notes.append(f"left out, not tensors: {names}")
        return notes


def report_on(checkpoint: Checkpoint, threshold: float | None = None) -> CheckpointReport:
    """Counts the zeros of a checkpoint, tensor by tensor.

    A weight is floating, complex or quantized, has two or more dimensions, and does not have the name of a bias or an
    embedding. The pairs `weight_orig` and `weight_mask` of torch.nn.utils.prune count as their product.

    Args:
        checkpoint: the tensors, as `read_checkpoint` returns them.
        threshold: if it is given, weights with |w| ≤ threshold are counted too.
    """
    tensors = checkpoint.tensors
    masks = {name: mask for name in tensors if (mask := _mask(name, tensors)) is not None}
    mask_names = {f"{name.removesuffix('_orig')}_mask" for name in masks}
    weights: list[WeightReport] = []
    others: dict[str, OtherTensors] = {}
    for name, tensor in tensors.items():  # one at a time, since mapped tensors need not fit in memory together
        plain = name.removesuffix("_orig") if name in masks else name
        kind = "pruning mask" if name in mask_names else _kind(plain.rpartition(".")[2], tensor)
        if kind:
            others[kind] = _with_tensor(others.get(kind, OtherTensors()), tensor)
        else:
            ties = checkpoint.ties.get(name, ())
            weights.append(_weight_report(plain, tensor, masks.get(name), threshold, ties))
    return CheckpointReport(checkpoint, threshold, tuple(weights), others)


def size_text(count: float) -> str:
    """A number of bytes in the unit that a reader expects.

    >>> size_text(512), size_text(1536), size_text(3 * 1024**3)
    ('512 B', '1.50 KiB', '3.00 GiB')
    """
    if count < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log(count, 1024)), 4)
    return f"{count / 1024**power:,.2f} {'KMGT'[power - 1]}iB"


def _mask(name: str, tensors: dict[str, Tensor]) -> Tensor | None:
    """The mask of torch.nn.utils.prune that belongs to `name`, or None."""
    plain, tensor = name.removesuffix("_orig"), tensors[name]
    mask = tensors.get(f"{plain}_mask")
    if plain == name or plain in tensors or mask is None:
        return None
    return mask if (mask.shape, mask.dtype) == (tensor.shape, tensor.dtype) else None


def _kind(attribute: str, tensor: Tensor) -> str:
    """The reason why `tensor` is not a weight, or ""."""
    if attribute in _STATISTICS:
        return "norm statistics"
    if tensor.dtype == _PACKED:
        return "packed type"
    if not tensor.numel():
        return "empty"
    if _is_repeated_view(tensor):
        return "repeated view"
    return kind_by_name(attribute, tensor.dequantize() if tensor.is_quantized else tensor)


def _is_repeated_view(tensor: Tensor) -> bool:
    """Whether it repeats a smaller storage, as expand() does; its entries may need more memory than there is."""
    return _n_bytes(tensor) > tensor.untyped_storage().nbytes()


def _n_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _computable(tensor: Tensor) -> Tensor:
    """`tensor` dequantized, or 8-bit floats as float32: all operations support the result."""
    if tensor.is_quantized:
        return tensor.dequantize()
    narrow = tensor.is_floating_point() and tensor.element_size() < 2
    return tensor.float() if narrow else tensor


def _weight_report(
    name: str, tensor: Tensor, mask: Tensor | None, threshold: float | None, ties: Sequence[str]
) -> WeightReport:
    values = _computable(tensor)
    if mask is not None:
        values = values * _computable(mask)
    layer = LayerSparsity(name, tuple(tensor.shape), tensor.numel(), *zero_counts(values != 0).tolist())
    nan, inf = _not_finite(values)
    n_nonzero, rows = layer.weights - layer.zeros, tensor.shape[0]
    csr = n_nonzero * (tensor.element_size() + _INDEX_BYTES) + (rows + 1) * _INDEX_BYTES
    return WeightReport(
        layer=layer,
        dtype=str(tensor.dtype).removeprefix("torch."),
        nan=nan,
        inf=inf,
        near_zero=0 if threshold is None else int((widened(values).abs() <= threshold).count_nonzero()),
        dense=_n_bytes(tensor),
        sparse=min(_n_bytes(tensor), csr),
        ties=tuple(ties),
    )


def _not_finite(values: Tensor) -> tuple[int, int]:
    """The number of NaN, and the number of infinities."""
    if values.numel() and not values.is_complex() and all(map(math.isfinite, map(float, values.aminmax()))):
        return 0, 0  # a NaN would be both minimum and maximum, so one pass is enough for nearly every tensor
    return int(values.isnan().count_nonzero()), int(values.isinf().count_nonzero())


def _with_tensor(others: OtherTensors, tensor: Tensor) -> OtherTensors:
    """The sums of `others` and one more tensor."""
    nan = inf = 0
    is_number = tensor.is_floating_point() or tensor.is_complex()
    if is_number and not _is_repeated_view(tensor) and tensor.dtype != _PACKED:
        nan, inf = _not_finite(_computable(tensor))
    stored = min(_n_bytes(tensor), tensor.untyped_storage().nbytes())
    return OtherTensors(
        others.tensors + 1,
        others.entries + tensor.numel(),
        others.bytes + stored,
        others.nan + nan,
        others.inf + inf,
    )
