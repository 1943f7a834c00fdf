"""Mixed precision: autocast and GradScaler leave the penalty, its prox and the solution what they are in float32."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import torchreg as tr
from tests.benchmarks.test_one_lambda import one_lambda
from tests.cases import Case, every_plain_case, same_bits, weights
from tests.models import batch, mlp, same, snapshot

CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))
every_device = pytest.mark.parametrize("device", ["cpu", CUDA])

GAPS = {torch.bfloat16: 1e-4, torch.float16: 1e-6}
"""What docs/with-pytorch.md promises of the objective under autocast, relative to scikit-learn's."""

# ---------------------------------------------------------------------- the solution

Build = Callable[[nn.Module, tr.Regularizer, Any], Optimizer]


def sgd(model: nn.Module, reg: tr.Regularizer, problem: Any) -> Optimizer:
    lr = 1 / problem.loss.lipschitz
    return tr.optim.ProxSGD(model.parameters(), lr=lr, momentum=0.9, regularizer=reg)


def adam(model: nn.Module, reg: tr.Regularizer, problem: Any) -> Optimizer:
    lr = 10 * problem.strength / problem.loss.lipschitz
    return tr.optim.ProxAdam(model.parameters(), lr=lr, fused=True, regularizer=reg)


def attached(model: nn.Module, reg: tr.Regularizer, problem: Any) -> Optimizer:
    optimizer = Adam(model.parameters(), lr=10 * problem.strength / problem.loss.lipschitz)
    tr.optim.attach(optimizer, reg)
    return optimizer


def loss_of(problem: Any, output: Tensor, y: Tensor) -> Tensor:
    if isinstance(problem.loss, one_lambda.Squared):
        return 0.5 * (output - y).square().sum() / len(y)
    return F.cross_entropy(output, y)


def solved(problem: Any, build: Build, dtype: torch.dtype, device: str, steps: int) -> Any:
    """The weights after training under autocast, with a GradScaler that meets infinities now and then."""
    x, y = problem.loss.tx.to(device, torch.float32), problem.loss.ty.to(device, torch.float32)
    model = nn.Linear(x.shape[1], y.shape[1], bias=False, device=device)
    nn.init.zeros_(model.weight)
    optimizer = build(model, tr.Regularizer(model, problem.penalty), problem)
    # Every infinity halves the scale, and 30 steps without one double it.
    scaler = torch.amp.GradScaler(device, init_scale=2.0**7, growth_interval=30, enabled=dtype is torch.float16)
    for t in range(steps):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            output = model(x)
        loss = loss_of(problem, output.float(), y)
        scaler.scale(loss * math.inf if scaler.is_enabled() and t % 50 == 7 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return model.weight.detach().cpu().double().numpy()


@pytest.fixture(scope="module")
def problems() -> dict[str, Any]:
    return {problem.name: problem for problem in one_lambda.problems(short=True)}


def assert_solved(problem: Any, build: Build, dtype: torch.dtype, device: str, steps: int) -> None:
    w = solved(problem, build, dtype, device, steps)
    assert abs(problem.gap(w)) <= GAPS[dtype]
    assert problem.same_support(w)


@every_device
@pytest.mark.parametrize(
    ("name", "dtype", "build"),
    [
        ("lasso, diabetes, λ/λ_max 0.1", torch.bfloat16, sgd),
        ("lasso, diabetes, λ/λ_max 0.1", torch.float16, attached),
        ("elastic net, diabetes, λ/λ_max 0.01", torch.bfloat16, adam),
        ("elastic net, diabetes, λ/λ_max 0.01", torch.float16, sgd),
        ("multinomial, wine, λ/λ_max 0.5", torch.bfloat16, attached),
        ("multinomial, wine, λ/λ_max 0.5", torch.float16, adam),
    ],
)
def test_under_autocast_training_reaches_scikit_learn_s_objective_and_support(
    name: str, dtype: torch.dtype, build: Build, device: str, problems: dict[str, Any]
) -> None:
    assert_solved(problems[name], build, dtype, device, steps=400)


@pytest.mark.slow
@every_device
@pytest.mark.parametrize("build", [sgd, adam, attached])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("data", "fraction"),
    [
        *itertools.product(["lasso, diabetes", "elastic net, diabetes", "multi-task lasso, wine"], [0.5, 0.1, 0.01]),
        *itertools.product(["multinomial, wine"], [0.5, 0.1]),  # at 0.01 float32 itself takes many thousand steps
    ],
)
def test_under_autocast_every_problem_has_scikit_learn_s_objective_and_support(
    data: str, fraction: float, dtype: torch.dtype, build: Build, device: str, problems: dict[str, Any]
) -> None:
    assert_solved(problems[f"{data}, λ/λ_max {fraction:g}"], build, dtype, device, steps=600)


# ---------------------------------------------------------------------- the scale


def scaled(build: Callable[[Any, tr.Regularizer], Optimizer], scale: float | None) -> dict[str, Tensor]:
    """The weights after six steps whose gradients were scaled, unscaled, clipped; None does without a scaler."""
    model = mlp()
    optimizer = build(model.parameters(), tr.Regularizer(model, tr.L1(0.05)))
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    x, y = batch()
    for _ in range(6):
        optimizer.zero_grad()
        scaler.scale(F.mse_loss(model(x), y)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    assert any((w == 0).any() for w in model.parameters() if w.dim() == 2)
    return snapshot(model)


def hooked(params: Any, reg: tr.Regularizer, kind: Any, **settings: Any) -> Optimizer:
    optimizer = kind(params, lr=0.05, **settings)
    tr.optim.attach(optimizer, reg)
    return optimizer


BUILDS: dict[str, Callable[[Any, tr.Regularizer], Optimizer]] = {
    "ProxSGD": lambda params, reg: tr.optim.ProxSGD(params, lr=0.1, momentum=0.9, regularizer=reg),
    "ProxAdam": lambda params, reg: tr.optim.ProxAdam(params, lr=0.05, regularizer=reg),
    "ProxAdam, fused": lambda params, reg: tr.optim.ProxAdam(params, lr=0.05, fused=True, regularizer=reg),
    "attached SGD": lambda params, reg: hooked(params, reg, SGD, momentum=0.9),
    "attached Adam, fused": lambda params, reg: hooked(params, reg, Adam, fused=True),
}


@pytest.mark.parametrize("build", BUILDS)
def test_the_prox_does_not_see_the_scale(build: str) -> None:
    found = {scale: scaled(BUILDS[build], scale) for scale in (None, 2.0**-8, 1.0, 2.0**16)}
    assert same(found[1.0], found[2.0**16])  # a power of two is undone exactly
    assert same(found[1.0], found[2.0**-8])
    for name, w in found[None].items():  # a fused step under a scaler is another kernel
        torch.testing.assert_close(w, found[1.0][name], rtol=1e-5, atol=1e-7)
        assert torch.equal(w == 0, found[1.0][name] == 0)


@pytest.mark.parametrize("way", ["scale(loss + reg())", "add_gradient_ after unscale_"])
def test_in_the_loss_the_penalty_is_scaled_and_unscaled_with_it(way: str) -> None:
    model = mlp()
    reg = tr.Regularizer(model, tr.ElasticNet(0.05, 0.1))
    x, y = batch()
    (F.mse_loss(model(x), y) + reg()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    loss = F.mse_loss(model(x), y)
    if way == "scale(loss + reg())":
        scaler.scale(loss + reg()).backward()
        scaler.unscale_(optimizer)
    else:
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        reg.add_gradient_()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------- autocast


@every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_plain_case
def test_autocast_changes_no_bit_of_a_penalty(case: Case, dtype: torch.dtype, device: str) -> None:
    w = weights((6, 5), torch.float32).to(device).requires_grad_()

    def parts() -> list[Tensor]:
        value = case.penalty(w)
        (gradient,) = torch.autograd.grad(value, w) if value.requires_grad else (torch.zeros_like(w),)
        return [value.detach(), gradient, case.penalty.prox(w, 0.3).detach()]

    plain = parts()
    with torch.autocast(device, dtype):
        for found, expected in zip(parts(), plain, strict=True):
            assert found.dtype == expected.dtype
            assert same_bits(found, expected)


@every_device
@pytest.mark.parametrize("build", BUILDS)
def test_autocast_changes_no_bit_of_a_step(build: str, device: str) -> None:
    found = []
    for enabled in (False, True):
        model = mlp().to(device)
        optimizer = BUILDS[build](model.parameters(), tr.Regularizer(model, tr.GroupLasso(0.05)))
        for _ in range(3):
            for p in model.parameters():
                p.grad = p.detach().cos()
            with torch.autocast(device, torch.bfloat16, enabled=enabled):
                optimizer.step()
        found.append(snapshot(model))
    assert same(*found)
