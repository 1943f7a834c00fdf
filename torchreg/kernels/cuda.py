"""Triton's kernels of one pass, for weights on a GPU: a launch or two for any number of tensors.

Triton comes along with this module, so it is imported only where there is a GPU, or where `TRITON_INTERPRET=1` runs the
kernels on the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import operator
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from torchreg.kernels import cuda_kernels as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""The kernels run as Python, on the CPU: how they are tested where there is no GPU. It is fixed at their import."""

BLOCK, LANES = 2048, 32
"""Weights that a program of a step takes, and rows that one of a preparation takes. Powers of 2."""

DTYPES = {
    torch.float32: (tl.float32, tl.float32),
    torch.float64: (tl.float64, tl.float64),
    torch.bfloat16: (tl.bfloat16, tl.float32),
    torch.float16: (tl.float16, tl.float32),
}
"""What a weight is in memory, and what it is computed in; the result is rounded to nearest, once."""

OPTIONS = {"enable_fp_fusion": False}
"""As the native kernels round: no product is contracted into a sum, on any GPU."""

# ---------------------------------------------------------------------- launches


class Step(NamedTuple):
    """The kernels of one optimizer, and how wide their rows are."""

    prepare: Any
    of_block: Any
    addresses: int
    numbers: int

    def launch(
        self,
        addresses: Tensor,
        numbers: Tensor,
        rows: int,
        blocks: dict[torch.dtype, Tensor],
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
        aligned: bool,
    ) -> None:
        """One step of all rows: a launch for what each tensor shares, and one for the weights of each dtype."""
        self.prepare[(-(-rows // LANES) or 1,)](
            addresses, numbers, rows, found_inf, LANES=LANES, **OPTIONS, num_warps=1
        )
        for dtype, every in blocks.items():
            real, work = DTYPES[dtype]
            kernels.step[(len(every),)](
                addresses,
                numbers,
                every,
                found_inf,
                grad_scale,
                OF_BLOCK=self.of_block,
                ADDRESSES=self.addresses,
                NUMBERS=self.numbers,
                REAL=real,
                WORK=work,
                ALIGNED=aligned,
                BLOCK=BLOCK,
                **OPTIONS,
                num_warps=4,
            )


adam = Step(kernels.prepare_adam, kernels.adam_block, kernels.ADAM_ADDRESSES.value, kernels.ADAM_NUMBERS.value)
sgd = Step(kernels.prepare_sgd, kernels.sgd_block, kernels.SGD_ADDRESSES.value, kernels.SGD_NUMBERS.value)


def try_out() -> None:
    """One small launch: it raises where Triton lacks a C compiler or does not know the device."""
    device = torch.device("cpu" if INTERPRETED else "cuda")
    addresses = array("q", [*(0 for _ in range(1, sgd.addresses)), 1])
    Table(sgd, addresses, [torch.float32], device).try_out(addresses, None, None)


def serves(device: torch.device) -> bool:
    """The kernels run on this device."""
    return device.type == ("cpu" if INTERPRETED else "cuda")


def capturing(device: torch.device) -> bool:
    """A CUDA graph records what is launched now, and nothing runs."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def pinned(entries: int, device: torch.device) -> Tensor:
    """Memory of the host from which a copy to this device is not waited for."""
    return torch.empty(entries, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")


def blocks_of(sizes: Mapping[int, int], device: torch.device) -> Tensor:
    """The blocks of the weights of these rows, each as row·2³² + its number within the row."""
    counts = torch.tensor([-(-size // BLOCK) for size in sizes.values()], dtype=torch.int64, device="cpu")
    every = torch.arange(int(counts.sum()), device="cpu")
    within = every - (counts.cumsum(0) - counts).repeat_interleave(counts)
    rows = torch.tensor(list(sizes), dtype=torch.int64, device="cpu").repeat_interleave(counts)
    return (rows * (1 << 32) + within).to(device)


def bits(addresses: array[int], width: int, columns: Iterable[int]) -> int:
    """Every bit that is set in one of the addresses of these columns."""
    return functools.reduce(operator.or_, (a for column in columns for a in addresses[column::width]), 0)


class Table:
    """Rows of addresses and numbers on the device, sent there when they have changed.

    Most steps find every tensor where the last one did, and send nothing; else it is one copy from pinned memory,
    which the host does not wait for. A CUDA graph gets a table of its own, which each replay fills from pinned memory
    of its own: what comes later, outside the graph, changes neither.

    Args:
        addresses: the rows as they are now; in later steps, gradients alone may lie elsewhere.
        dtypes: of the weights.
    """

    def __init__(self, step: Step, addresses: array[int], dtypes: Sequence[torch.dtype], device: torch.device) -> None:
        self.step, self.rows, self.device = step, len(dtypes), device
        sizes = dict(enumerate(addresses[step.addresses - 1 :: step.addresses]))
        self.blocks = {}
        for dtype in dict.fromkeys(dtype for row, dtype in enumerate(dtypes) if sizes[row]):
            self.blocks[dtype] = blocks_of({row: sizes[row] for row in sizes if dtypes[row] is dtype}, device)
        self._bits = bits(addresses, step.addresses, (0, *range(2, step.addresses - 4)))
        self._entries = self.rows * (step.addresses + step.numbers)
        self._table = torch.empty(self._entries, dtype=torch.int64, device=device)
        self._sent = b""
        self._tried: set[tuple[bool, bool, bool]] = set()
        self._spare: Tensor | None = self._pinned()  # memory cannot be pinned while a graph is captured
        self._captured: list[tuple[Tensor, Tensor]] = []

    @property
    def may_be_captured(self) -> bool:
        """There is pinned memory for a graph."""
        return self._spare is not None

    def try_out(self, addresses: array[int], found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """Compiles what a step needs by a step of no weight at all; raises whatever is wrong with the compiler."""
        kind = (self._are_aligned(addresses), found_inf is None, grad_scale is None)
        if kind in self._tried:
            return
        nothing = torch.zeros(self._entries, dtype=torch.int64, device=self.device)
        nothing[self.rows * self.step.addresses :].view(torch.float64).fill_(1.0)  # by which one may divide
        none = {dtype: torch.zeros(1, dtype=torch.int64, device=self.device) for dtype in self.blocks}
        self._launch(nothing, 0, none, found_inf, grad_scale, kind[0])
        self._tried.add(kind)

    def run(
        self, addresses: array[int], numbers: array[float], found_inf: Tensor | None, grad_scale: Tensor | None
    ) -> None:
        """One step of all rows."""
        content = addresses.tobytes() + numbers.tobytes()
        table = self._table
        if capturing(self.device):
            host, self._spare = self._spare, None
            assert host is not None
            table = torch.empty_like(table)
            self._captured.append((table, host))
            _send(content, host, table)
        else:
            if content != self._sent:
                _send(content, self._pinned(), table)
                self._sent = content
            if self._spare is None:
                self._spare = self._pinned()
        self._launch(table, self.rows, self.blocks, found_inf, grad_scale, self._are_aligned(addresses))

    def _are_aligned(self, addresses: array[int]) -> bool:
        """Everything begins where 16 bytes may be loaded at once."""
        return (self._bits | bits(addresses, self.step.addresses, (1,))) % 16 == 0

    def _launch(
        self,
        table: Tensor,
        rows: int,
        blocks: dict[torch.dtype, Tensor],
        found_inf: Tensor | None,
        grad_scale: Tensor | None,
        aligned: bool,
    ) -> None:
        addresses, numbers = table.split([self.rows * self.step.addresses, self.rows * self.step.numbers])
        with current(self.device):
            self.step.launch(addresses, numbers.view(torch.float64), rows, blocks, found_inf, grad_scale, aligned)

    def _pinned(self) -> Tensor:
        return pinned(self._entries, self.device)


def _send(content: bytes, host: Tensor, table: Tensor) -> None:
    """Torch keeps pinned memory until the copy from it is done, also where nobody holds it any longer."""
    ctypes.memmove(host.data_ptr(), content, len(content))
    table.copy_(host, non_blocking=True)


# ---------------------------------------------------------------------- penalties


@functools.lru_cache(64)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Cached blocks of a list of sizes."""
    return blocks_of(dict(enumerate(sizes)), device)


def soft(
    task: int,
    weights: Sequence[Tensor],
    strengths: Sequence[tuple[float, float]],
    anchors: Sequence[Tensor | None],
    gradients: Sequence[Tensor | None],
    slope: Tensor | None,
) -> Tensor:
    """Carries out a task of `soft.py` on weights of one dtype and device, and returns the value there."""
    device, dtype = weights[0].device, weights[0].dtype
    addresses, numbers = array("q"), array("d")
    for w, gradient, anchor, pair in zip(weights, gradients, anchors, strengths, strict=True):
        others = (0 if x is None else x.data_ptr() for x in (gradient, anchor))
        addresses.extend((w.data_ptr(), *others, w.numel()))
        numbers.extend(pair)
    table = torch.empty(6 * len(weights), dtype=torch.int64, device=device)
    _send(addresses.tobytes() + numbers.tobytes(), pinned(len(table), device), table)
    blocks = _blocks(tuple(w.numel() for w in weights), device)
    sums = torch.zeros(len(blocks), dtype=torch.float64, device=device)
    slope = torch.ones((), dtype=dtype, device=device) if slope is None else slope.to(dtype)
    if len(blocks):
        with current(device):
            kernels.soft[(len(blocks),)](
                table[: 4 * len(weights)],
                table[4 * len(weights) :].view(torch.float64),
                blocks,
                slope,
                sums,
                TASK=task,
                REAL=DTYPES[dtype][0],
                ALIGNED=bits(addresses, 4, range(3)) % 16 == 0,
                BLOCK=BLOCK,
                **OPTIONS,
                num_warps=4,
            )
    return sums.sum().to(dtype)
