"""Curves of λ over time, against torch's own schedulers of the learning rate, and what moves a factor along them."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim import lr_scheduler

import torchreg as tr
from tests.backends import needs_native
from tests.models import batch, mlp, same, snapshot
from torchreg.optim.executors.native import NativeExecutor
from torchreg.training.schedules import (
    Chain,
    Constant,
    Cosine,
    Cubic,
    Exponential,
    Geometric,
    Linear,
    Polynomial,
    Steps,
)

RAMPS = [
    Linear(0, 2, 7),
    Cosine(0.5, 0, 7),
    Polynomial(0, 1, 7, power=2),
    Cubic(1, 0.1, 7),
    Geometric(1e-3, 1, 7),
]


def learning_rates(make: Callable[[Any], Any], steps: int) -> list[float]:
    """What a scheduler of torch makes of a learning rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # of SequentialLR itself, in an old torch
@pytest.mark.parametrize(
    ("curve", "make"),
    [
        (Constant(1), lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        (Linear(0.25, 1, 8), lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, 8)),
        (Linear(1, 0, 8), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, 8)),
        (Polynomial(1, 0, 8, power=2.5), lambda o: lr_scheduler.PolynomialLR(o, 8, 2.5)),
        (Cubic(1, 0, 8), lambda o: lr_scheduler.PolynomialLR(o, 8, 3.0)),
        (Exponential(1, 0, time=-1 / math.log(0.8)), lambda o: lr_scheduler.ExponentialLR(o, 0.8)),
        (Steps(1, {9: 0.01, 4: 0.1}), lambda o: lr_scheduler.MultiStepLR(o, [4, 9], 0.1)),
        (
            Chain(Linear(0.5, 1, 4), Cubic(1, 0, 8)),
            lambda o: lr_scheduler.SequentialLR(
                o, [lr_scheduler.LinearLR(o, 0.5, 1.0, 4), lr_scheduler.PolynomialLR(o, 8, 3.0)], [4]
            ),
        ),
    ],
    ids=lambda part: None if isinstance(part, FunctionType) else str(part),
)
def test_a_curve_is_that_of_torch(curve, make):
    assert [curve(step) for step in range(15)] == pytest.approx(learning_rates(make, 15), abs=1e-7)


def test_a_cosine_is_that_of_torch():
    # torch's goes up again after its end.
    rates = learning_rates(lambda o: lr_scheduler.CosineAnnealingLR(o, 8, 0.1), 9)
    assert [Cosine(1, 0.1, 8)(step) for step in range(9)] == pytest.approx(rates, abs=1e-7)


def test_a_geometric_curve_is_that_of_numpy():
    curve = Geometric(1e-4, 10, steps=12)
    np.testing.assert_allclose([curve(step) for step in range(13)], np.geomspace(1e-4, 10, 13), rtol=1e-12)


@pytest.mark.parametrize("curve", RAMPS, ids=str)
def test_a_ramp_begins_and_ends_exactly_and_holds_before_and_after(curve):
    assert [curve(step) for step in (-3, 0)] == [curve.start] * 2
    assert [curve(step) for step in (7, 8, 10**9)] == [curve.end] * 3
    inside = [curve(step) for step in range(8)]
    assert sorted(inside, reverse=curve.end < curve.start) == inside
    assert len(set(inside)) == 8


def test_a_chain_holds_the_first_curve_and_hands_over_at_its_end():
    curve = Chain(Constant(0, steps=3), Linear(0, 1, 4), lambda step: 10.0 + step)
    assert [curve(step) for step in (0, 2, 3, 5, 6, 7, 8)] == [0, 0, 0, 0.5, 0.75, 10, 11]
    nested = Chain(Chain(Linear(0, 1, 2), Linear(1, 0, 2)), Constant(5))
    assert [nested(step) for step in range(6)] == [0, 0.5, 1, 0.5, 5, 5]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Linear(-1, 1, 10), ValueError, "start=-1 must be finite and at least 0"),
        (lambda: Cosine(0, math.inf, 10), ValueError, "end=inf must be finite"),
        (lambda: Cubic("0", 1, 10), TypeError, "start='0' is a str"),
        (lambda: Linear(0, 1, 0), ValueError, "steps=0 must be at least 1"),
        (lambda: Linear(0, 1, 2.5), TypeError, r"steps=2.5 is a float, not a whole number; round it with int\(\)"),
        (lambda: Polynomial(0, 1, 10, power=0), ValueError, "power=0 never leaves the start"),
        (lambda: Geometric(0, 1, 10), ValueError, "cannot reach or leave 0 by ratios; begin at 1e-3"),
        (lambda: Geometric(1, 0, 10), ValueError, "cannot reach or leave 0 by ratios"),
        (lambda: Exponential(1, 0, time=0), ValueError, "time=0 is not a time constant"),
        (lambda: Steps(1, {0: 2}), ValueError, "milestone=0 must be at least 1"),
        (lambda: Steps(1, {5: math.nan}), ValueError, r"milestones\[5\]=nan must be finite"),
        (lambda: Steps(1, [5, 6]), TypeError, "is not a dict; pass the value from each step on"),
        (lambda: Constant(1, steps=True), TypeError, "steps=True is a bool"),
        (lambda: Chain(), ValueError, "a chain of no curves has no value"),
        (lambda: Chain(Linear(0, 1, 2), 1.0), TypeError, "1.0 is not a curve"),
        (lambda: Chain(Constant(1), Linear(1, 0, 2)), ValueError, "has no end, so nothing can follow it"),
        (lambda: Chain(Exponential(1, 0, 5), Constant(1)), ValueError, "has no end"),
    ],
)
def test_wrong_values_are_refused_when_a_curve_is_made(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---------------------------------------------------------------------- the schedule

RULES = {"fc1.weight": tr.L1(1e-2), "fc2.weight": tr.ElasticNet(l1=1e-2, l2=1e-3)}


def train(model, optimizer, schedule, steps):
    for seed in range(schedule.last_step, schedule.last_step + steps):
        x, y = batch(seed)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        schedule.step()


def parts(curve=None, optimizer=tr.optim.ProxAdam):
    model = mlp()
    reg = tr.Regularizer(model, RULES)
    return (
        model,
        reg,
        optimizer(model.parameters(), lr=1e-2, regularizer=reg),
        tr.Schedule(reg, curve or Linear(0, 1, 4)),
    )


def test_the_first_factor_is_set_at_once_and_each_step_sets_the_next():
    reg = tr.Regularizer(mlp(), RULES)
    schedule = tr.Schedule(reg, Linear(0, 1, steps=4))
    seen = []
    for _ in range(6):
        assert schedule.last_factor == {key: reg[key].factor for key in reg}
        seen.append([reg[key].factor for key in reg])
        schedule.step()
    assert seen == [[f, f] for f in (0, 0.25, 0.5, 0.75, 1, 1)]
    assert schedule.last_step == 6
    assert reg["fc1.weight"].strength == 1e-2, "λ itself stays as it is"


def test_terms_have_curves_of_their_own_and_others_are_left_alone():
    reg = tr.Regularizer(mlp(), {**RULES, "norm.weight": tr.L2(1e-3)})
    reg["norm.weight"].factor = 0.3
    schedule = tr.Schedule(reg, {"fc1.weight": Linear(0, 1, 2), "fc2.weight": lambda epoch: 2.0**-epoch})
    schedule.step()
    assert {key: reg[key].factor for key in reg} == {"fc1.weight": 0.5, "fc2.weight": 0.5, "norm.weight": 0.3}
    assert schedule.last_factor == {"fc1.weight": 0.5, "fc2.weight": 0.5}


@pytest.mark.parametrize(
    ("curve", "error", "message"),
    [
        (0.5, TypeError, "0.5 is not a curve"),
        ({}, ValueError, "names no term"),
        ({"fc3.weight": Linear(0, 1, 2)}, ValueError, "no term 'fc3.weight' to schedule; the terms are"),
        ({"fc1.weight": Linear(0, 1, 2), "fc2.weight": 1.0}, TypeError, "1.0 is not a curve"),
        ({"fc1.weight": Linear(0, 1, 2), "fc2.weight": lambda step: -1.0}, ValueError, r"\(0\)=-1.0 must be finite"),
        (lambda step: None, TypeError, "is a NoneType, not a number"),
    ],
)
def test_what_is_no_schedule_is_refused_and_nothing_has_changed(curve, error, message):
    reg = tr.Regularizer(mlp(), RULES)
    with pytest.raises(error, match=message):
        tr.Schedule(reg, curve)
    assert [reg[key].factor for key in reg] == [1.0, 1.0]


def test_a_curve_that_fails_later_leaves_every_factor_and_the_count_as_they_were():
    reg = tr.Regularizer(mlp(), RULES)
    curves = {"fc1.weight": Linear(0, 1, 4), "fc2.weight": lambda step: math.nan if step == 2 else 1.0}
    schedule = tr.Schedule(reg, curves)
    schedule.step()
    with pytest.raises(ValueError, match=r"\(2\)=nan must be finite"):
        schedule.step()
    assert (schedule.last_step, schedule.last_factor, reg["fc1.weight"].factor) == (
        1,
        {"fc1.weight": 0.25, "fc2.weight": 1.0},
        0.25,
    )


def test_something_that_is_no_regularizer_is_refused():
    with pytest.raises(TypeError, match=r"expected a Regularizer, .* got MLP"):
        tr.Schedule(mlp(), Linear(0, 1, 2))


def test_a_run_goes_on_from_a_checkpoint_bit_for_bit():
    model, reg, optimizer, schedule = parts(Chain(Cosine(0, 1, 5), Exponential(1, 0.1, time=3)))
    train(model, optimizer, schedule, 3)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, reg, optimizer, schedule)], file)
    train(model, optimizer, schedule, 6)

    resumed = parts(Chain(Cosine(0, 1, 5), Exponential(1, 0.1, time=3)))
    file.seek(0)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(resumed[0], resumed[2], resumed[3], 6)
    assert same(snapshot(model), snapshot(resumed[0]))
    assert schedule.last_factor == resumed[3].last_factor


def test_loading_sets_the_factors_whatever_the_regularizer_had():
    reg = tr.Regularizer(mlp(), RULES)
    schedule = tr.Schedule(reg, Linear(0, 1, 4))
    schedule.load_state_dict({"last_step": 3})
    assert reg["fc2.weight"].factor == 0.75
    for state, error in (([3], TypeError), ({"step": 3}, TypeError), ({"last_step": -1}, ValueError)):
        with pytest.raises(error):
            schedule.load_state_dict(state)
    assert schedule.last_step == 3


def test_a_copy_of_all_has_a_schedule_of_its_own():
    model, reg, optimizer, schedule = parts()
    train(model, optimizer, schedule, 2)
    twins = copy.deepcopy((model, reg, optimizer, schedule))
    train(model, optimizer, schedule, 2)
    assert twins[1]["fc1.weight"].factor == 0.5
    train(twins[0], twins[2], twins[3], 2)
    assert same(snapshot(model), snapshot(twins[0]))


def test_a_compiled_loss_does_not_recompile_when_the_factor_moves():
    torch.compiler.reset()
    model = mlp()
    reg = tr.Regularizer(model, RULES)
    schedule = tr.Schedule(reg, Chain(Constant(0, steps=1), Cubic(0, 1, 3)))
    loss = lambda x, y: F.mse_loss(model(x), y) + reg()  # noqa: E731
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    compiled(*batch())
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(5):
            torch.testing.assert_close(compiled(*batch()), loss(*batch()))
            schedule.step()
    torch.compiler.reset()


@needs_native
@pytest.mark.parametrize("kind", [tr.optim.ProxSGD, tr.optim.ProxAdam, tr.optim.ProxAdamW])
def test_the_native_step_keeps_its_tables_while_the_factor_moves(kind, monkeypatch):
    made = []
    before = NativeExecutor._build
    monkeypatch.setattr(NativeExecutor, "_build", lambda self, *args: made.append(1) or before(self, *args))
    model, _, optimizer, schedule = parts(Linear(0.1, 1, 20), kind)
    train(model, optimizer, schedule, 3)
    settled = len(made)
    train(model, optimizer, schedule, 20)
    assert settled > 0
    assert len(made) == settled


def test_a_warm_up_from_zero_begins_as_the_stock_optimizer():
    model, _, optimizer, schedule = parts(Chain(Constant(0, steps=3), Linear(0, 1, 3)))
    twin = mlp()
    stock = torch.optim.Adam(twin.parameters(), lr=1e-2)
    train(model, optimizer, schedule, 3)
    for seed in range(3):
        x, y = batch(seed)
        stock.zero_grad()
        F.mse_loss(twin(x), y).backward()
        stock.step()
    assert same(snapshot(model), snapshot(twin))
