"""Small models, numbers and counters that several tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import sklearn
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchreg as tr
from torchreg.optim import Attachment

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
"""The version of torch, such as (2, 6)."""

L1_LOGISTIC = {"l1_ratio": 1.0} if tuple(map(int, sklearn.__version__.split(".")[:2])) >= (1, 8) else {"penalty": "l1"}
"""Of scikit-learn's LogisticRegression: from 1.8 on the kind of the penalty follows from its ratio."""

STRICT = (sys.executable, "-W", "error" if TORCH >= (2, 15) else "ignore")
"""A Python in which warnings are errors; the oldest versions that examples draw on warn of each other."""

SHARDS = (
    torch.distributed.is_available()
    and torch.distributed.is_gloo_available()
    and sys.platform != "win32"
    and hasattr(torch.cpu.Stream, "record_event")
)
"""Processes on gloo can share weights by `fully_shard`; that of torch 2.6 fails on a CPU."""


@dataclass(frozen=True)
class Counted(tr.L1):
    """L1 that writes down the step of each prox."""

    steps: list[Any] = field(default_factory=list)

    name: ClassVar[str] = "counted"

    def prox_map(self, w: Tensor, step: Any) -> Tensor:
        self.steps.append(step)
        return super().prox_map(w, step)


class Bare(tr.L1):
    """L1 as a user might write it: a value and a prox, and no certificates."""

    nearest_subgradient = tr.Penalty.nearest_subgradient
    dual_norm = tr.Penalty.dual_norm
    conjugate = tr.Penalty.conjugate


class MLP(nn.Module):
    """fc1 6→5, a norm layer, fc2 5→3: two weights that are selected, four parameters that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.fc2 = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(self.fc1(x)).relu())


class Lazy(nn.Module):
    """Like `MLP`, with an fc2 that learns its width at the first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 5)
        self.fc2 = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


class Halved(nn.Module):
    """A parametrization: the weight is half of what is stored."""

    def forward(self, w: Tensor) -> Tensor:
        return w / 2

    def right_inverse(self, w: Tensor) -> Tensor:
        return w * 2


def mlp(seed: int = 0) -> MLP:
    torch.manual_seed(seed)
    return MLP()


def batch(seed: int = 1, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randn(n, 3, generator=generator)


def array(w: Tensor) -> np.ndarray:
    """The weights in float64 (or complex128), for numbers that owe nothing to torch."""
    w = w.detach()
    return w.to(torch.complex128 if w.is_complex() else torch.float64).numpy().copy()


def l1(w: Tensor) -> float:
    return float(np.abs(array(w)).sum())


def l2(w: Tensor) -> float:
    return float((np.abs(array(w)) ** 2).sum())


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in model.named_parameters()}


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Bit for bit the same weights."""
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


class Reads:
    """Counts the reads of tensors by the host inside a `with` block: each makes an accelerator wait."""

    _CALLS = ("tolist", "numpy", "cpu")  # they leave no trace among the operations on a CPU
    _OPERATIONS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Reads:
        reads = self

        class Operations(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                reads.count += func in Reads._OPERATIONS
                return func(*args, **(kwargs or {}))

        class Calls(TorchFunctionMode):
            def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                reads.count += getattr(func, "__name__", "") in Reads._CALLS
                return func(*args, **(kwargs or {}))

        self._stack = ExitStack()
        self._stack.enter_context(Operations())
        self._stack.enter_context(Calls())
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()


def attachments_of(optimizer: torch.optim.Optimizer) -> list[Attachment]:
    """Every attachment that an optimizer carries, in its hooks or in its own step."""
    found = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_post_hooks.values()]
    found.append(getattr(optimizer, "attachment", None))
    return [attachment for attachment in found if isinstance(attachment, Attachment)]


Make = Callable[[Any, tr.Regularizer], torch.optim.Optimizer]
"""Builds an optimizer of parameters that carries a regularizer's prox."""


def attached(kind: type[torch.optim.Optimizer], **settings: Any) -> Make:
    def make(params: Any, reg: tr.Regularizer) -> torch.optim.Optimizer:
        optimizer = kind(params, **settings)
        tr.optim.attach(optimizer, reg)
        return optimizer

    return make
