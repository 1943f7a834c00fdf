"""Faults and odd models: what is not finite, empty, oddly laid out, huge; threads and forked processes."""

from __future__ import annotations

import copy
import itertools
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adadelta, Adafactor, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

import torchreg as tr
from tests import cases
from tests.backends import backend as backend
from tests.cases import every_case, same_bits
from torchreg.optim import ProxAdam, ProxAdamW, ProxSGD, attach

SWAP_INS = [(ProxSGD, {"momentum": 0.9}), (ProxAdam, {}), (ProxAdamW, {})]
STOCK = [
    (SGD, {"momentum": 0.9}),
    (torch.optim.ASGD, {}),
    (Adam, {}),
    (AdamW, {}),
    (Adamax, {}),
    (NAdam, {}),
    (RAdam, {}),
    (RMSprop, {"momentum": 0.9}),
    (Adagrad, {}),
    (Adadelta, {}),
    (Adafactor, {}),
]
EVERY = [*SWAP_INS, *STOCK]
every_optimizer = pytest.mark.parametrize(("kind", "settings"), EVERY, ids=[kind.__name__ for kind, _ in EVERY])


def proximal(reg: tr.Regularizer, kind: Any, settings: dict[str, Any]) -> Any:
    """The optimizer with the prox of `reg`."""
    model = reg.model
    if issubclass(kind, tr.optim.ProxSGD | tr.optim.ProxAdam | tr.optim.ProxAdamW):
        return kind(model.parameters(), lr=0.05, **settings, regularizer=reg)
    optimizer = kind(model.parameters(), lr=0.05, **settings)
    attach(optimizer, reg)
    return optimizer


def step(optimizer: Optimizer, t: int, gradient: Callable[[int, Tensor], Tensor]) -> None:
    """One step, in which each weight has a gradient of its own."""
    for i, w in enumerate(w for group in optimizer.param_groups for w in group["params"]):
        w.grad = gradient(1000 * t + i, w)
    optimizer.step()


def noise(seed: int, w: Tensor) -> Tensor:
    """In the plain layout, whatever the weight's."""
    return torch.randn(w.shape, generator=torch.Generator().manual_seed(seed)).to(w.dtype)


# ---------------------------------------------------------------------- not finite


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@every_case
def test_an_infinite_weight_changes_no_other_weight_or_group(case, value):
    w = case.weights(20)
    hit = torch.where(case.shaped(torch.arange(20) == 5), value, w)
    rest = ~case.touched(hit.isinf())
    for own in cases.steps(w):
        assert same_bits(case.on(w).prox(hit, own)[rest], case.on(w).prox(w, own)[rest])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("penalty", [tr.L1(0.01), tr.GroupLasso(0.01)], ids=["l1", "group_lasso"])
@every_optimizer
def test_the_prox_spreads_a_gradient_that_is_not_finite_no_further(kind, settings, penalty, value):
    def broken(seed: int, w: Tensor) -> Tensor:
        gradient = noise(seed, w)
        if seed == 2000:
            gradient[1, 2] = value
        return gradient

    def trained(penalty: tr.Penalty, gradient: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        optimizer = proximal(tr.Regularizer(model, penalty), kind, settings)
        for t in range(5):
            step(optimizer, t, gradient)
        return [w.detach() for w in model.parameters()]

    clean, hurt, alone = trained(penalty, noise), trained(penalty, broken), trained(tr.L1(0.0), broken)
    for w, expected, without in zip(hurt, clean, alone, strict=True):
        wrong = ~without.isfinite()  # by the optimizer itself, without a prox
        if isinstance(penalty, tr.GroupLasso) and w.dim() == 2:
            wrong = wrong.any(1, keepdim=True).expand_as(w)
        assert torch.equal(~w.isfinite(), wrong)
        if kind is not Adafactor:  # whose step of one weight is made of those of all
            assert torch.equal(w[~wrong], expected[~wrong])


def test_explain_counts_what_is_not_finite():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    reg = tr.Regularizer(model, tr.L1(0.1))
    assert "infinite" not in reg.explain()
    with torch.no_grad():
        model[1].weight[0] = torch.tensor([math.nan, math.inf, 1.0])
    assert [line.split()[0] for line in reg.explain().splitlines() if "2 NaN or infinite" in line] == ["1.weight"]


# ---------------------------------------------------------------------- shapes and layouts


class Odd(nn.Module):
    """Nothing at all, in two shapes, a single number, and a plain weight."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.rows = nn.Parameter(torch.empty(3, 0))
        self.scalar = nn.Parameter(torch.tensor(0.04))
        self.plain = nn.Parameter(torch.full((2, 3), 0.04))


PENALTIES = [tr.L1(2.0), tr.ElasticNet(2.0, 0.1), tr.GroupLasso(9.0), tr.L0(2.0), tr.Reweighted(tr.LogSum(2.0))]


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: penalty.name)
@every_optimizer
def test_empty_weights_and_single_numbers_are_ordinary(kind, settings, penalty):
    model = Odd()
    names = ["empty", "rows", "plain", *(["scalar"] if penalty.name != "group_lasso" else [])]
    if kind is Adafactor:  # torch's own divides by the number of weights
        names = [name for name in names if name not in ("empty", "rows")]
        del model.empty, model.rows
    reg = tr.Regularizer(model, penalty, include=names)
    optimizer = proximal(reg, kind, settings)
    for _ in range(40):
        step(optimizer, 0, lambda seed, w: torch.full_like(w, 0.01))
    if kind is not Adadelta:  # whose steps begin at 1e-5
        assert (model.plain == 0).all()
        assert "scalar" not in names or model.scalar == 0
    assert reg().isfinite()
    assert all(math.isfinite(number) for number in tr.measure(reg).values())
    assert tr.sparsity(reg).weights == 6 + ("scalar" in names)
    assert ("0×3" in reg.explain()) == ("empty" in names)
    assert tr.stationarity(reg).total >= 0


def as_they_are(w: Tensor) -> Tensor:
    return w


def channels_last(w: Tensor) -> Tensor:
    return w.contiguous(memory_format=torch.channels_last)


def reversed_dimensions(w: Tensor) -> Tensor:
    return w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)


def every_second(w: Tensor) -> Tensor:
    return torch.stack([w, w + 1], -1)[..., 0]


LAYOUTS = [channels_last, reversed_dimensions, every_second]
every_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


def laid_out(layout: Callable[[Tensor], Tensor]) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, dtype=torch.float64), nn.Conv2d(4, 2, 3, dtype=torch.float64))
    for conv in model:
        conv.weight = nn.Parameter(layout(conv.weight.detach()))
    return model


@pytest.mark.parametrize("penalty", [tr.L1(0.2), tr.GroupLasso(0.1)], ids=lambda penalty: penalty.name)
@every_layout
@every_optimizer
@pytest.mark.usefixtures("backend")
def test_a_weight_keeps_its_layout_and_gets_the_same_numbers(kind, settings, layout, penalty):
    found = []
    for how in (as_they_are, layout):
        model = laid_out(how)
        strides = [w.stride() for w in model.parameters()]
        optimizer = proximal(tr.Regularizer(model, penalty), kind, settings)
        for t in range(4):  # with gradients in the plain layout
            step(optimizer, t, noise)
        assert [w.stride() for w in model.parameters()] == strides
        found.append([w.detach() for w in model.parameters()])
    for w, expected in zip(*found, strict=True):
        assert torch.allclose(w, expected, rtol=1e-12, atol=1e-14)
        assert torch.equal(w == 0, expected == 0)


@every_layout
@pytest.mark.parametrize(("kind", "settings"), SWAP_INS, ids=[kind.__name__ for kind, _ in SWAP_INS])
@pytest.mark.usefixtures("backend")
def test_a_checkpoint_of_plain_layout_goes_on_in_another(kind, settings, layout):
    plain = laid_out(as_they_are)
    optimizer = proximal(tr.Regularizer(plain, tr.L1(0.2)), kind, settings)
    for t in range(3):
        step(optimizer, t, noise)
    other = laid_out(layout)
    other.load_state_dict(plain.state_dict())
    optimizer2 = proximal(tr.Regularizer(other, tr.L1(0.2)), kind, settings)
    optimizer2.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # its moments come in the layout of the file
    for t in range(3, 6):
        step(optimizer, t, noise)
        step(optimizer2, t, lambda seed, w: torch.empty_like(w).copy_(noise(seed, w)))
    for w, expected in zip(other.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(w, expected, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------- large models


def test_ten_thousand_weights_cost_ten_times_a_thousand():
    def seconds(count: int) -> list[float]:
        marks = [time.process_time()]
        model = nn.ParameterList([nn.Parameter(torch.ones(2, 2)) for _ in range(count)])
        reg = tr.Regularizer(model, {"1*": tr.L2(1e-3), "*": tr.L1(1e-3)})
        optimizer = ProxAdam(model.parameters(), lr=1e-3, regularizer=reg)
        marks.append(time.process_time())
        for w in model:
            w.grad = torch.ones_like(w)
        for _ in range(2):
            optimizer.step()
        marks.append(time.process_time())
        tr.measure(reg)
        marks.append(time.process_time())
        optimizer.state_dict()  # torch's own load_state_dict is quadratic
        reg()
        marks.append(time.process_time())
        return [after - before for before, after in itertools.pairwise(marks)]

    seconds(100)
    few, many = seconds(1000), seconds(10_000)
    assert all(b < 30 * a + 1 for a, b in zip(few, many, strict=True)), (few, many)


@pytest.mark.parametrize("penalty", [tr.L1(0.1), tr.GroupLasso(0.1)], ids=lambda penalty: penalty.name)
@pytest.mark.parametrize(("kind", "settings"), [*SWAP_INS, (RMSprop, {})], ids=lambda x: getattr(x, "__name__", ""))
def test_a_weight_beyond_2_to_the_31_entries_is_taken_on_the_meta_device(kind, settings, penalty):
    model = nn.Linear(65_536, 65_536, bias=False, device="meta")
    reg = tr.Regularizer(model, penalty)
    optimizer = proximal(reg, kind, settings)
    step(optimizer, 0, lambda seed, w: torch.empty_like(w))
    assert "4294967296" in reg.explain()
    assert reg().shape == ()
    w = model.weight.detach()
    assert penalty.prox(w, 0.1).shape == penalty.prox(w, torch.empty_like(w)).shape == w.shape


# ---------------------------------------------------------------------- threads and processes


def fit(seed: int, rounds: int = 6) -> list[Tensor]:
    """A model's training in a few rounds, each with an optimizer of its own."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 2))
    with torch.no_grad():
        for w in model.parameters():
            w.copy_(torch.randn(w.shape, generator=generator) / 4)
    for number in range(rounds):
        kind, settings = EVERY[(seed + number) % len(EVERY)]
        optimizer = proximal(tr.Regularizer(model, tr.L1(1e-3)), kind, settings)
        for _ in range(4):
            x = torch.randn(8, 10, generator=generator)
            optimizer.zero_grad()
            (model(x) - x[:, :2]).square().mean().backward()
            optimizer.step()
        if isinstance(optimizer, tr.optim.ProxSGD | tr.optim.ProxAdam | tr.optim.ProxAdamW):
            optimizer.attachment.remove()
        del optimizer
    return [w.detach() for w in model.parameters()]


@pytest.fixture
def switching_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_models_trained_in_threads_end_as_those_trained_one_by_one(switching_often):
    expected = [fit(seed) for seed in range(4)]
    found: dict[int, list[Tensor]] = {}
    threads = [threading.Thread(target=lambda seed=seed: found.update({seed: fit(seed)})) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, weights in enumerate(expected):
        assert all(map(torch.equal, found[seed], weights)), seed


def test_optimizers_may_be_made_in_many_threads_at_once(switching_often):
    made: list[Any] = []

    def make() -> None:
        for _ in range(40):
            model = nn.Linear(2, 2)
            made.append((model, proximal(tr.Regularizer(model, tr.L1(0.1)), ProxSGD, {})))

    threads = [threading.Thread(target=make) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()  # an error in a thread is a warning, and so an error, of pytest's
    assert len(made) == 160


class Proxed(torch.utils.data.Dataset[Tensor]):
    """A data set that uses the library itself."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Tensor:
        return tr.functional.soft_threshold(torch.full((10,), float(index)), 1.0)


needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.cuda.is_available(), reason="a forked process cannot use the GPU of its parent"
)
# Python 3.12 warns of every fork of a process that has threads.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@needs_fork
@forks
def test_a_forked_data_loader_works_while_the_parent_trains():
    loader = torch.utils.data.DataLoader(Proxed(), batch_size=4, num_workers=1, multiprocessing_context="fork")
    fit(0, rounds=1)
    batches = []
    for x in loader:
        fit(1, rounds=1)
        batches.append(x)
    assert torch.cat(batches)[:, 0].tolist() == [0, 0, 1, 2, 3, 4, 5, 6]


@needs_fork
@forks
def test_a_forked_process_trains_as_its_parent(tmp_path):
    big = nn.Linear(300, 300)
    optimizer = proximal(tr.Regularizer(big, tr.L1(1e-3)), ProxAdam, {})
    for t in range(2):  # in all of the parent's threads
        step(optimizer, t, noise)
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # torch's own operations hang in more, once the parent has used its threads
            step(optimizer, 2, noise)
            torch.save([big.weight.detach(), *fit(3)], tmp_path / "child.pt")
        finally:
            os._exit(0)
    for _ in range(600):
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        pytest.fail("the forked process hangs")
    step(optimizer, 2, noise)
    found = torch.load(tmp_path / "child.pt", weights_only=True)
    assert all(map(torch.equal, found, [big.weight.detach(), *fit(3)]))
