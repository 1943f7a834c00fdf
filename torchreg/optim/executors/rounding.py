"""Rounding of a step in float32 to weights and moments that are narrower."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from torchreg._distributed import local_part
from torchreg._tensors import PIECE
from torchreg.kernels.random_bits import draws, stochastic, word_of

NARROW = (torch.bfloat16, torch.float16)
"""The dtypes in which a step would lose what it adds: bfloat16 has 8 bits, float16 has 11."""

DRAW = {"": 0, "exp_avg": 1, "momentum_buffer": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
"""Which of three draws of random bits is whose; "" is the weight."""

Numbers = Mapping[str, tuple[Tensor, Tensor]]
"""(narrow, wide) of the weight, whose name is "", and of each of its buffers; of one shape."""


class Rounding(ABC):
    """The rounding of bfloat16 and float16 weights and moments after a step of ProxSGD, ProxAdam and ProxAdamW.

    The step with its prox is in float32, and each number is rounded once: by `StochasticRounding`, if nothing is said,
    or by `NearestRounding`. Weights in float32 and float64 are not rounded.

    >>> model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    >>> _ = torch.nn.init.ones_(model.weight)
    >>> optimizer = tr.optim.ProxSGD(model.parameters(), lr=1e-4, regularizer=Regularizer(model, L1(1.0)))
    >>> for _ in range(1000):  # each takes away 1e-4, where the neighbours of 1 lie 4e-3 and 8e-3 away
    ...     model.weight.grad = torch.zeros_like(model.weight)
    ...     optimizer.step()
    >>> 0.85 < model.weight.item() < 0.95
    True
    """

    @abstractmethod
    def key(self, state: dict[str, Any]) -> int | None:
        """The key of the random bits of a weight with this state, −1 for none at all; None before its first step."""

    @abstractmethod
    def write(self, numbers: Numbers, optimizer: Optimizer, state: dict[str, Any], number: int) -> None:
        """Writes each wide tensor into its narrow one, when the optimizer's `number`-th parameter has stepped.

        Args:
            state: of that parameter, after the step.
        """


@dataclass(frozen=True)
class NearestRounding(Rounding):
    """Rounding to the nearest number of the weights' dtype, as torch rounds.

    A move below half a spacing is lost, at every step again: bfloat16 weights stand still as soon as lr times the
    update is below 0.2% of them, and a mean of squares with β₂ = 0.999 does so from the beginning.

    >>> NearestRounding()
    NearestRounding()
    """

    def key(self, state: dict[str, Any]) -> int | None:
        return -1

    def write(self, numbers: Numbers, optimizer: Optimizer, state: dict[str, Any], number: int) -> None:
        for narrow, wide in numbers.values():
            narrow.copy_(wide)


@dataclass(frozen=True)
class StochasticRounding(Rounding):
    """Rounding to one of the two neighbours, to the nearer one more often, so that the mean is the value.

    What a single step is too small to change, many steps change. Zeros and all other numbers of the dtype stay what
    they are. The random bits are a function of the seed, the parameter's number in the optimizer, the step and the
    place in the weight: torch's generators are not touched, and a run goes on from a checkpoint bit for bit. A key made
    of the first two stands as `rounding` in the optimizer's state of each parameter, with SGD's count of steps as
    `step`; the stock optimizers load such a state, and theirs is taken.

    Args:
        seed: any integer; another one gives another run.
    Raises:
        TypeError: seed is not an integer.
    Source: Gupta, Agrawal, Gopalakrishnan and Narayanan, 2015; Zamirai, Zhang, Aberger and De Sa, 2020.

    >>> StochasticRounding(seed=1)
    StochasticRounding(seed=1)
    """

    seed: int = 0

    KEY = "rounding"

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed={self.seed!r} is a {type(self.seed).__name__}, not an integer; write seed=0")

    def key(self, state: dict[str, Any]) -> int | None:
        return state.get(self.KEY)

    def write(self, numbers: Numbers, optimizer: Optimizer, state: dict[str, Any], number: int) -> None:
        weight = local_part(numbers[""][0])
        if self.KEY not in state:
            digest = hashlib.sha256(f"{self.seed} {number}".encode()).digest()
            state[self.KEY] = int.from_bytes(digest[:4], "little") >> 1
        if isinstance(optimizer, SGD):
            # As Adam's, but on the device, where a captured graph counts on.
            step = state.get("step")
            one = torch.ones((), dtype=torch.float32, device=weight.device)
            state["step"] = one if step is None else step.add_(1)
        word, size = word_of(state[self.KEY], state["step"]), weight.numel()
        flat = {name: (_flat(narrow), _flat(wide, narrow)) for name, (narrow, wide) in numbers.items()}
        piece = PIECE if weight.is_cpu else max(size, 1)
        for first in range(0, size, piece):
            here = slice(first, min(first + piece, size))
            random = draws(word, first, here.stop - first, weight.device)
            for name, (narrow, wide) in flat.items():
                narrow[here] = stochastic(wide[here], weight.dtype, random[DRAW[name]])
        for name, (narrow, _) in numbers.items():
            if not _is_dense(local_part(narrow)):
                narrow.copy_(flat[name][0].view(narrow.shape))


def _flat(x: Tensor, like: Tensor | None = None) -> Tensor:
    """The entries of `x` in the order in which those of `like` lie in memory; a view of it, where that is dense."""
    x, like = local_part(x), local_part(x if like is None else like)
    if not _is_dense(like):
        return x.reshape(-1)
    if x.stride() != like.stride():
        x = torch.empty_like(like, dtype=x.dtype).copy_(x)
    return x.as_strided((x.numel(),), (1,))


def _is_dense(x: Tensor) -> bool:
    """Its entries fill a stretch of memory, in some order: `empty_like` keeps the strides of such memory alone."""
    return x.is_contiguous() or torch.empty_like(x, device="meta").stride() == x.stride()
