"""Any shape, dtype, layout, step and strength: what holds of every penalty and of every swap-in's step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import torchreg as tr
from tests import cases
from tests.cases import Case, same_bits, to_double
from torchreg.optim import ProxAdam, ProxAdamW, ProxSGD

SETTINGS = hypothesis.settings(cases.SETTINGS, max_examples=150)
OF_STEPS = hypothesis.settings(cases.SETTINGS, max_examples=60)
LAYOUTS = ["plain", "reversed", "strided", "channels last"]


def laid_out(w: Tensor, layout: str) -> Tensor:
    """The same entries in other strides."""
    if layout == "reversed":
        order = tuple(reversed(range(w.dim())))
        return w.permute(order).contiguous().permute(order)
    if layout == "strided":
        return torch.stack([w, w + 1], -1)[..., 0]
    if layout == "channels last" and w.dim() == 4:
        return w.contiguous(memory_format=torch.channels_last)
    return w


@dataclass
class Problem:
    """A penalty, weights and a step for it."""

    case: Case
    w: Tensor
    step: float | Tensor
    seed: int

    @property
    def penalty(self) -> tr.Penalty:
        return self.case.on(self.w)

    def others(self, count: int, spread: float = 1.0) -> list[Tensor]:
        """Random weights like these."""
        generator = torch.Generator().manual_seed(self.seed)
        return [
            (torch.randn(self.w.shape, generator=generator, dtype=torch.float64) * spread).to(self.w.dtype)
            for _ in range(count)
        ]

    def energy(self, u: Tensor) -> float:
        """½‖u − w‖²_{1/step} + Ω(u)."""
        return (((u - self.w).abs() ** 2 / (2 * self.step)).sum() + self.penalty(u)).item()


@st.composite
def problems(draw: Any, chosen: list[Case], dtypes: list[torch.dtype], least: float = 0.0) -> Problem:
    case = draw(st.sampled_from(chosen))
    shape, dtype = draw(st.sampled_from(case.shapes)), draw(st.sampled_from(dtypes))
    seed, layout = draw(st.integers(0, 999)), draw(st.sampled_from(LAYOUTS))
    w = laid_out(cases.weights(shape, dtype, seed), layout)
    number = draw(st.floats(least, 50.0) | st.sampled_from([least, 1.0]))
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(seed)
        wide = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
        spread = least + number * torch.rand(shape, generator=generator, dtype=wide)
        return Problem(case, w, spread, seed)
    return Problem(case, w, number, seed)


ANY = problems(cases.CASES, cases.DTYPES)


@SETTINGS
@given(problem=ANY)
def test_finite_goes_in_and_comes_out_in_the_same_shape_dtype_and_place(problem: Problem) -> None:
    w, before = problem.w, problem.w.clone()
    p, value = problem.penalty.prox(w, problem.step), problem.penalty(w)
    assert (p.shape, p.dtype) == (w.shape, w.dtype)
    assert p.isfinite().all()
    assert value.shape == ()
    assert math.isfinite(value)
    assert value >= 0
    assert same_bits(w, before)
    strides = w.stride()
    assert problem.penalty.prox_(w, problem.step) is w
    assert w.stride() == strides
    assert problem.case.agree(w, p, before)


@SETTINGS
@given(problem=ANY)
def test_the_minimum_stays_and_a_step_of_0_moves_nothing(problem: Problem) -> None:
    rest = problem.case.anchor(problem.w)
    assert torch.equal(problem.penalty.prox(rest, problem.step), rest)
    w = problem.w + 0.0  # no -0.0, which some make 0.0
    assert same_bits(problem.penalty.prox(w, 0.0), w)


@SETTINGS
@given(problem=problems([case for case in cases.CASES if not case.anchored], cases.DTYPES))
def test_no_weight_grows_and_zeros_stay(problem: Problem) -> None:
    w, p = problem.w, problem.penalty.prox(problem.w, problem.step)
    rounding = 12 * torch.finfo(w.dtype).eps
    assert (to_double(p).abs() <= to_double(w).abs() * (1 + rounding)).all()
    assert (p[w == 0] == 0).all()


@SETTINGS
@given(problem=problems(cases.EXACT, [torch.float64], least=1e-3), spread=st.sampled_from([1.0, 0.1, 1e-3]))
def test_no_neighbour_has_a_lower_objective_than_the_prox(problem: Problem, spread: float) -> None:
    p = problem.penalty.prox(problem.w, problem.step)
    least = problem.energy(p)
    neighbours = [p + other for other in problem.others(8, spread)]
    neighbours += [p * (1 + other) for other in problem.others(4, spread)]  # zeros kept
    neighbours += [torch.zeros_like(p), problem.w, problem.case.anchor(problem.w)]
    for u in neighbours:
        assert least <= problem.energy(u) + 1e-12 * (1 + abs(least))


@SETTINGS
@given(problem=problems(cases.CONVEX, [torch.float64, torch.complex128], least=1e-3))
def test_the_prox_of_a_convex_penalty_brings_no_two_weights_further_apart(problem: Problem) -> None:
    [other] = problem.others(1, spread=3.0)

    def apart(a: Tensor, b: Tensor) -> float:
        return ((a - b).abs() ** 2 / problem.step).sum().item()

    moved = apart(problem.penalty.prox(problem.w, problem.step), problem.penalty.prox(other, problem.step))
    assert moved <= apart(problem.w, other) * (1 + 1e-9) + 1e-20


# ---------------------------------------------------------------------- the swap-ins

KINDS: list[tuple[Any, dict[str, Any]]] = [
    (ProxSGD, {}),
    (ProxSGD, {"momentum": 0.9}),
    (ProxSGD, {"momentum": 0.9, "nesterov": True}),
    (ProxAdam, {}),
    (ProxAdam, {"amsgrad": True}),
    (ProxAdam, {"foreach": True}),
    (ProxAdamW, {"weight_decay": 0.0}),
]
PENALTIES = [tr.L1, tr.L2, tr.GroupLasso, tr.MCP, tr.L0, lambda strength: tr.Reweighted(tr.LogSum(strength))]
CONVEX = PENALTIES[:3]
REAL = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Some(nn.Module):
    """Weights of any shape, dtype and layout."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(w) for w in weights])


@dataclass
class Training:
    kind: Any
    settings: dict[str, Any]
    penalty: tr.Penalty
    weights: list[Tensor]
    lr: float
    seed: int

    def run(self, weights: list[Tensor], steps: int, size: float = 1.0, lr: float | None = None) -> list[Tensor]:
        """The weights after a few steps with random gradients, 0 for every third weight."""
        model = Some([torch.empty_strided(w.shape, w.stride(), dtype=w.dtype).copy_(w) for w in weights])
        reg = tr.Regularizer(model, self.penalty)
        optimizer = self.kind(model.parameters(), lr=self.lr if lr is None else lr, regularizer=reg, **self.settings)
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(steps):
            for w in model.parameters():
                gradient = size * torch.randn(w.shape, generator=generator, dtype=torch.float64)
                gradient.view(-1)[::3] = 0
                w.grad = gradient.to(w.dtype)
            optimizer.step()
        return [w.detach() for w in model.parameters()]


@st.composite
def trainings(draw: Any, penalties: list[Any] = PENALTIES, dtypes: list[torch.dtype] = REAL) -> Training:
    kind, settings = draw(st.sampled_from(KINDS))
    seed, dtype = draw(st.integers(0, 999)), draw(st.sampled_from(dtypes))
    shapes = draw(
        st.lists(st.sampled_from([(2, 3), (5, 1), (2, 1, 3, 2), (3, 2, 2, 2), (0, 3)]), min_size=1, max_size=3)
    )
    weights = [
        laid_out(cases.weights(shape, dtype, seed + i), draw(st.sampled_from(LAYOUTS)))
        for i, shape in enumerate(shapes)
    ]
    strength = draw(st.sampled_from([0.0, 1e-4, 0.1, 30.0]) | st.floats(0, 5))
    if dtype == torch.float16:  # at strength 0 it is stock Adam's step, whose ε is 0 in float16: 0/0
        strength = max(strength, 1e-4)
    return Training(
        kind, settings, draw(st.sampled_from(penalties))(strength), weights, draw(st.floats(1e-4, 0.5)), seed
    )


@OF_STEPS
@given(training=trainings())
def test_a_step_keeps_weights_finite_and_their_dtype_and_layout(training: Training) -> None:
    for before, after in zip(training.weights, training.run(training.weights, steps=3), strict=True):
        dense = torch.empty_strided(before.shape, before.stride(), dtype=before.dtype)
        assert (after.dtype, after.stride()) == (before.dtype, dense.stride())
        assert after.isfinite().all()


@OF_STEPS
@given(training=trainings())
def test_a_zero_without_a_gradient_stays_zero_and_lr_0_moves_nothing(training: Training) -> None:
    for after in training.run([torch.zeros_like(w) for w in training.weights], steps=3):
        assert (after.reshape(-1)[::3] == 0).all()
    for before, after in zip(training.weights, training.run(training.weights, steps=3, lr=0.0), strict=True):
        assert torch.equal(before, after)


@OF_STEPS
@given(training=trainings(penalties=[tr.L1, tr.GroupLasso]))
def test_a_strength_beyond_all_gradients_makes_every_weight_zero(training: Training) -> None:
    strong = Training(**{**vars(training), "penalty": type(training.penalty)(1e5), "lr": 0.1})
    assert all((w == 0).all() for w in strong.run(strong.weights, steps=3, size=0.1))


@OF_STEPS
@given(training=trainings(penalties=CONVEX, dtypes=[torch.float64]))
def test_two_runs_with_the_same_gradients_come_no_further_apart(training: Training) -> None:
    others = [w + torch.sin(w * 7 + 1) for w in training.weights]
    apart = [(a - b).abs().max() if a.numel() else 0.0 for a, b in zip(training.weights, others, strict=True)]
    pairs = zip(training.run(training.weights, steps=1), training.run(others, steps=1), apart, strict=True)
    for a, b, before in pairs:
        if training.penalty.separable and a.numel():
            assert (a - b).abs().max() <= before * (1 + 1e-9)
        elif training.kind is ProxSGD and a.numel():  # one step for all: in the norm
            assert (a - b).norm() <= before * math.sqrt(a.numel()) * (1 + 1e-9)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_the_layouts_are_what_they_say(layout: str) -> None:
    w = torch.arange(36.0).reshape(2, 3, 3, 2)
    assert torch.equal(laid_out(w, layout), w)
    assert laid_out(w, layout).stride() != w.stride()
