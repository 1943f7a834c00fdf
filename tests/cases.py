"""The penalties under test, one row each: every certificate runs over all of them.

To add a penalty, add its rows to `CASES`, with a strength of 0 among them; a completeness test names what is missing.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
from collections.abc import Iterable, Iterator

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor

import torchreg.penalties
from tests import oracles
from torchreg import (
    L0,
    L1,
    L2,
    MCP,
    SCAD,
    CappedL1,
    Columns,
    ElasticNet,
    GroupLasso,
    LogSum,
    Penalty,
    Reweighted,
    SparseGroupLasso,
    TransformedL1,
)
from torchreg.penalties.toward import Toward
from torchreg.penalties.weighted_l1 import WeightedL1

# Derandomized: a red run is the same on every machine. No deadline: the first example pays for torch's warm-up.
SETTINGS = hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)

REAL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
COMPLEX = [torch.complex128, torch.complex64]
DTYPES = REAL + COMPLEX
SHAPES = [(), (0,), (0, 3), (5,), (2, 3), (2, 3, 4), (2, 1, 3, 2)]
EPS32 = torch.finfo(torch.float32).eps


@dataclasses.dataclass(frozen=True)
class Case:
    """A penalty beside its oracle. `anchored`: the row is the penalty moved to an anchor, and so is its oracle."""

    penalty: Penalty
    oracle: oracles.Separable | oracles.Grouped
    anchored: bool = False

    def __str__(self) -> str:
        return ("toward " if self.anchored else "") + repr(self.penalty)

    @property
    def kind(self) -> type[Penalty]:
        return Toward if self.anchored else type(self.penalty)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Those of `SHAPES` on which the penalty is defined."""
        return [shape for shape in SHAPES if self.oracle.takes(shape)]

    def shaped(self, x: Tensor) -> Tensor:
        """The entries of `x` in one dimension, or as near to a square as they go where the penalty needs two."""
        if self.oracle.takes((x.numel(),)):
            return x.flatten()
        rows = max(d for d in range(1, math.isqrt(x.numel()) + 1) if x.numel() % d == 0)
        return x.reshape(rows, -1)

    def weights(self, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """`weights` of `count` entries, shaped."""
        return self.shaped(weights((count,), dtype))

    def anchor(self, w: Tensor) -> Tensor:
        """Where the penalty of `w` has its minimum."""
        if not self.anchored:
            return torch.zeros_like(w)
        anchor = torch.linspace(-1.5, 1.5, w.numel(), dtype=torch.float64).reshape(w.shape)
        return (anchor * (0.5 - 0.75j) if w.is_complex() else anchor).to(w.dtype)

    def on(self, w: Tensor) -> Penalty:
        """The penalty for weights like `w`."""
        return Toward(self.penalty, self.anchor(w)) if self.anchored else self.penalty

    def value(self, w: Tensor) -> float:
        """What the oracle says the penalty of `w` is."""
        return self.oracle.value(oracles.to_numpy(w) - oracles.to_numpy(self.anchor(w)))

    def prox(self, w: Tensor, step: float | Tensor) -> Tensor:
        """What the oracle says the prox is, in double precision."""
        anchor = oracles.to_numpy(self.anchor(w))
        steps = oracles.to_numpy(step) if isinstance(step, Tensor) else step
        return torch.from_numpy(np.asarray(anchor + self.oracle.prox(oracles.to_numpy(w) - anchor, steps)))

    def size(self, w: Tensor) -> Tensor:
        """|w| + |anchor| in double precision, of the entry or its group: what its rounding errors are relative to."""
        modulus = to_double(w).abs() + to_double(self.anchor(w)).abs()
        return torch.from_numpy(np.array(self.oracle.scale(modulus.numpy())))

    def touched(self, hit: Tensor) -> Tensor:
        """The entries whose prox depends on those that are `hit`."""
        return torch.from_numpy(np.array(self.oracle.touched(hit.numpy())))

    def agree(self, a: Tensor, b: Tensor, w: Tensor) -> bool:
        """Two results for `w` are equal; where they contain sums, whose order is free, but for their rounding."""
        if self.penalty.separable:
            return torch.equal(a, b)
        allowed = 12 * torch.finfo(w.dtype).eps * self.size(w)
        return bool(((to_double(a) - to_double(b)).abs() <= allowed).all())


def to_double(w: Tensor) -> Tensor:
    return w.to(torch.complex128 if w.is_complex() else torch.float64)


STRENGTHS = [0.0, 0.3, 4.0]
PAIRS = [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3), (0.3, 1.5)]
PLAIN = [
    *(Case(L1(strength), oracles.l1(strength)) for strength in STRENGTHS),
    *(Case(L2(strength), oracles.l2(strength)) for strength in STRENGTHS),
    *(Case(ElasticNet(l1, l2), oracles.elastic_net(l1, l2)) for l1, l2 in PAIRS),
    *(Case(GroupLasso(strength), oracles.Grouped(0.0, strength)) for strength in STRENGTHS),
    Case(GroupLasso(0.3, Columns()), oracles.Grouped(0.0, 0.3, axis=1)),
    *(Case(SparseGroupLasso(l1, group), oracles.Grouped(l1, group)) for l1, group in PAIRS),
    Case(SparseGroupLasso(0.3, 0.4, Columns()), oracles.Grouped(0.3, 0.4, axis=1)),
]
TOWARD = [
    Case(L1(0.0), oracles.l1(0.0), anchored=True),
    Case(L1(0.3), oracles.l1(0.3), anchored=True),
    Case(L2(0.3), oracles.l2(0.3), anchored=True),
    Case(ElasticNet(0.3, 1.5), oracles.elastic_net(0.3, 1.5), anchored=True),
    Case(GroupLasso(0.0), oracles.Grouped(0.0, 0.0), anchored=True),
    Case(GroupLasso(0.3), oracles.Grouped(0.0, 0.3), anchored=True),
    Case(SparseGroupLasso(0.3, 0.4, Columns()), oracles.Grouped(0.3, 0.4, axis=1), anchored=True),
]
WEIGHTED = [
    Case(WeightedL1(0.0, torch.tensor(2.0)), oracles.l1(0.0)),
    Case(WeightedL1(0.3, torch.tensor(2.0)), oracles.l1(0.6)),
]
CONVEX = [*PLAIN, *TOWARD, *WEIGHTED]
CONCAVE = [
    *(Case(MCP(strength), oracles.mcp(strength)) for strength in STRENGTHS),
    Case(MCP(0.3, gamma=0.5), oracles.mcp(0.3, 0.5)),
    *(Case(SCAD(strength), oracles.scad(strength)) for strength in STRENGTHS),
    Case(SCAD(0.3, a=1.5), oracles.scad(0.3, 1.5)),
    *(Case(L0(strength), oracles.l0(strength)) for strength in STRENGTHS[:2]),
    *(Case(LogSum(strength), oracles.log_sum(strength)) for strength in STRENGTHS),
    Case(LogSum(0.3, epsilon=1.0), oracles.log_sum(0.3, 1.0)),
    *(Case(TransformedL1(strength), oracles.transformed_l1(strength)) for strength in STRENGTHS),
    Case(TransformedL1(0.3, a=0.05), oracles.transformed_l1(0.3, 0.05)),
    *(Case(CappedL1(strength, theta=0.5), oracles.capped_l1(strength, 0.5)) for strength in STRENGTHS),
]
REWEIGHTED = [
    Case(Reweighted(MCP(0.0)), oracles.mcp(0.0)),
    Case(Reweighted(MCP(0.3)), oracles.mcp(0.3)),
    Case(Reweighted(LogSum(0.3)), oracles.log_sum(0.3)),
    Case(Reweighted(SCAD(0.3)), oracles.scad(0.3), anchored=True),
]
EXACT = [*CONVEX, *CONCAVE, Case(LogSum(0.3), oracles.log_sum(0.3), anchored=True)]
"""Those whose prox is the argmin."""

CASES = [*EXACT, *REWEIGHTED]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_exact_case = pytest.mark.parametrize("case", EXACT, ids=str)
every_convex_case = pytest.mark.parametrize("case", CONVEX, ids=str)
every_plain_case = pytest.mark.parametrize("case", [*PLAIN, *CONCAVE, *REWEIGHTED[:3]], ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def concrete_penalties() -> list[type[Penalty]]:
    """Every penalty class of the library that can be made, in whatever file it stands."""
    for module in pkgutil.walk_packages(torchreg.penalties.__path__, "torchreg.penalties."):
        importlib.import_module(module.name)

    def below(kind: type[Penalty]) -> Iterator[type[Penalty]]:
        for subclass in kind.__subclasses__():
            yield subclass
            yield from below(subclass)

    return [
        kind
        for kind in below(Penalty)
        if kind.__module__.startswith("torchreg.penalties.") and not inspect.isabstract(kind)
    ]


def lacking(kinds: Iterable[type[Penalty]], cases: Iterable[Case]) -> list[str]:
    """The names of the classes that have no row, or none with a strength of 0."""
    cases = list(cases)
    zero = {case.kind for case in cases if case.penalty.is_zero}
    nonzero = {case.kind for case in cases if not case.penalty.is_zero}
    return [kind.__name__ for kind in kinds if kind not in zero or kind not in nonzero]


def weights(shape: Iterable[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Weights of both signs over a few powers of ten, the same every time; every seventh is 0."""
    shape = tuple(shape)
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    w = w * 10.0 ** torch.randint(-2, 2, shape, generator=generator)
    if dtype.is_complex:
        w = w * torch.exp(1j * torch.randn(shape, generator=generator, dtype=torch.float64))
    zero = torch.arange(w.numel()).reshape(shape) % 7 == 3
    return torch.where(zero, 0.0, w).to(dtype)


def layouts(w: Tensor) -> Iterator[Tensor]:
    """The same values as `w` in other strides: reversed dimensions, and every second entry of a larger tensor."""
    reverse = tuple(reversed(range(w.dim())))
    yield w.permute(reverse).contiguous().permute(reverse)
    yield torch.stack([w, w + 1], dim=-1)[..., 0]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the last bit: NaN equals NaN, and −0.0 is not 0.0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    parts = [(torch.view_as_real(x) if x.is_complex() else x).resolve_conj().contiguous() for x in (a, b)]
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parts[0].element_size()]
    return torch.equal(parts[0].view(width), parts[1].view(width))


def steps(w: Tensor) -> Iterator[float | Tensor]:
    """A step as a number, and as one number for each weight, from 0 to 2."""
    yield 0.7
    count = max(w.numel() - 1, 1)
    yield (torch.arange(w.numel(), dtype=torch.float64).reshape(w.shape) * (2 / count)).to(w.real.dtype)


assert len({str(case) for case in CASES}) == len(CASES)
