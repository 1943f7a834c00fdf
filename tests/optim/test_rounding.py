"""bfloat16 and float16 weights end where float32 weights do: stepped in float32, rounded once, by chance."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import ElasticNet
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

import torchreg as tr
from tests.backends import AVAILABLE, needs_native
from tests.backends import backend as backend
from tests.kernels.test_steps import Weights, give_gradients
from tests.oracles.diabetes import diabetes
from torchreg.optim import NearestRounding, StochasticRounding
from torchreg.optim.executors import low_precision

bf16 = torch.bfloat16
EVERY: list[tuple[Any, dict[str, Any]]] = [
    (tr.optim.ProxSGD, {}),
    (tr.optim.ProxSGD, {"momentum": 0.9}),
    (tr.optim.ProxAdam, {}),
    (tr.optim.ProxAdam, {"amsgrad": True}),
    (tr.optim.ProxAdamW, {}),
]
STOCK: dict[Any, Any] = {tr.optim.ProxSGD: SGD, tr.optim.ProxAdam: Adam, tr.optim.ProxAdamW: AdamW}
CANCELLED = 4 * 2**-23
"""The error of float32 in a weight that is a small difference of numbers up to 4."""
every = pytest.mark.parametrize(("kind", "settings"), EVERY, ids=str)


def built(kind: Any, penalty: tr.Penalty | None = None, dtype: torch.dtype = bf16, **settings: Any) -> tuple[Any, Any]:
    model = Weights(dtype)
    reg = tr.Regularizer(model, penalty or tr.L1(0.05))
    return model, kind(model.parameters(), **{"lr": 0.01, **settings}, regularizer=reg)


def trained(model: nn.Module, optimizer: Any, steps: range) -> None:
    for t in steps:
        give_gradients(model, t)
        optimizer.step()


def equal(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(w, v) for w, v in zip(model.parameters(), other.parameters(), strict=True))


def spacing(x: Tensor) -> Tensor:
    """Of the numbers of bfloat16 around x."""
    return 2.0 ** (x.abs().double().clamp(min=1e-30).log2().floor() - 7)


# ---------------------------------------------------------------------- the solution of float32


class Lasso:
    """½·MSE + 0.1·Σ|w| or an elastic net of it, on data that bfloat16 holds exactly; scikit-learn is the judge."""

    def __init__(self, ratio: float) -> None:
        x, y = diabetes()
        self.x, self.y, self.ratio = x.to(bf16), (y / y.std()).to(bf16), ratio
        inputs, targets = self.x.double().numpy(), self.y.double().numpy()
        judge = ElasticNet(0.1, l1_ratio=ratio, fit_intercept=False, tol=1e-12, max_iter=100_000)
        self.solution: NDArray[np.float64] = judge.fit(inputs, targets).coef_

    def objective(self, w: NDArray[np.float64]) -> float:
        error = self.x.double().numpy() @ w - self.y.double().numpy()
        penalty = self.ratio * np.abs(w).sum() + 0.5 * (1 - self.ratio) * np.square(w).sum()
        return float(0.5 * np.square(error).mean() + 0.1 * penalty)

    def trained(self, make: Any, steps: int, dtype: torch.dtype, **settings: Any) -> NDArray[np.float64]:
        torch.manual_seed(0)
        model = nn.Linear(10, 1, bias=False, dtype=dtype)
        reg = tr.Regularizer(model, tr.ElasticNet.from_sklearn(0.1, self.ratio))
        optimizer = make(model.parameters(), **settings, regularizer=reg)
        x, y = self.x.float(), self.y.float()
        for _ in range(steps):
            error = model.weight.detach().float() @ x.T - y
            model.weight.grad = (error @ x / len(y)).to(dtype)
            optimizer.step()
        return model.weight.detach().double().numpy()[0]

    def gap(self, w: NDArray[np.float64]) -> float:
        best = self.objective(self.solution)
        return (self.objective(w) - best) / best


TOLERANCE = 5e-5
"""Of the objective, relative: the noise of 8 bits costs a tenth of it, and nearest rounding a hundred times that."""

PARITY = [(tr.optim.ProxSGD, {"lr": 0.02}, 700), (tr.optim.ProxAdam, {"lr": 0.003}, 800)]
parity = pytest.mark.parametrize(("kind", "settings", "steps"), PARITY, ids=str)


@pytest.mark.parametrize("ratio", [1.0, 0.5], ids=["lasso", "elastic net"])
@parity
def test_bfloat16_weights_reach_the_solution_and_its_support(
    kind: Any, settings: dict[str, Any], steps: int, ratio: float, backend: str
) -> None:
    problem = Lasso(ratio)
    w = problem.trained(kind, steps, bf16, **settings)
    assert problem.gap(w) < TOLERANCE
    assert ((w != 0) == (problem.solution != 0)).all()
    assert 0 < np.count_nonzero(w) < 10


@parity
def test_float16_weights_reach_them_too(kind: Any, settings: dict[str, Any], steps: int) -> None:
    problem = Lasso(1.0)
    w = problem.trained(kind, steps, torch.float16, **settings)
    assert problem.gap(w) < TOLERANCE
    assert ((w != 0) == (problem.solution != 0)).all()


@parity
def test_rounding_to_nearest_does_not(kind: Any, settings: dict[str, Any], steps: int) -> None:
    """The control of the test above: its tolerance tells the two apart."""
    problem = Lasso(1.0)
    w = problem.trained(kind, steps, bf16, rounding=NearestRounding(), **settings)
    assert problem.gap(w) > 20 * TOLERANCE


# ---------------------------------------------------------------------- one step


@pytest.mark.parametrize("scale", [1.0, 2**-7])
@every
def test_the_mean_of_many_roundings_is_the_step_of_float64(
    kind: Any, settings: dict[str, Any], scale: float, backend: str
) -> None:
    """100,000 equal weights: their mean is within 6 standard deviations, each at most half a spacing, of the truth."""
    n, steps = 100_000, 3
    ends = []
    for dtype, size in ((bf16, n), (torch.float64, 1)):
        model = nn.Linear(size, 1, bias=False, dtype=dtype)
        nn.init.constant_(model.weight, 0.75)
        reg = tr.Regularizer(model, tr.L1(0.5 * scale))
        optimizer = kind(model.parameters(), lr=1e-3 * scale, **settings, regularizer=reg)
        for _ in range(steps):
            model.weight.grad = torch.full_like(model.weight, scale)
            optimizer.step()
        buffers = {
            key: v for key, v in optimizer.state[model.weight].items() if key != "step" and isinstance(v, Tensor)
        }
        ends.append({"": model.weight.detach(), **buffers})
    assert len(ends[0]["" if kind is tr.optim.ProxSGD else "exp_avg"].unique()) > 1
    for name, found in ends[0].items():
        truth = ends[1][name].double().mean()
        assert found.dtype is bf16
        error = (found.double().mean() - truth).abs()
        # Adam's own step changes with the noise of its moments, to second order of half a percent.
        curvature = 1e-5 * scale * truth.abs() if name == "" and kind is not tr.optim.ProxSGD else 0.0
        assert error <= 6 * math.sqrt(steps) * 0.5 * spacing(truth) / math.sqrt(n) + curvature, name


@every
def test_to_nearest_there_is_one_rounding(kind: Any, settings: dict[str, Any], backend: str) -> None:
    """Of 16,770 weights, those of a float64 step rounded once, but where float32 lies on the other side of a tie."""
    model, optimizer = built(kind, rounding=NearestRounding(), **settings)
    exact, truth = built(kind, dtype=torch.float64, **settings)
    for t in range(3):
        truth.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        with torch.no_grad():
            for w, v in zip(exact.parameters(), model.parameters(), strict=True):
                w.copy_(v)
        give_gradients(model, t)
        for w, v in zip(exact.parameters(), model.parameters(), strict=True):
            w.grad = torch.empty_like(w).copy_(v.grad)
        optimizer.step()
        truth.step()
        different = model.matrix != exact.matrix.to(bf16)
        assert different.sum() <= 10
        assert ((model.matrix.double() - exact.matrix).abs() <= 0.51 * spacing(exact.matrix) + CANCELLED).all()


def test_a_mean_of_squares_fades_as_in_float32_and_in_the_stock_class_stands_still(backend: str) -> None:
    """v ← β₂·v takes off 0.1%, where a rounding to nearest adds up to 0.2% again."""
    steps, means = 300, []
    for kind in (tr.optim.ProxAdamW, AdamW):
        model = nn.Linear(2000, 1, bias=False, dtype=bf16)
        more = {"regularizer": tr.Regularizer(model, tr.L1(1e-6))} if kind is tr.optim.ProxAdamW else {}
        optimizer = kind(model.parameters(), lr=1e-4, **more)
        for t in range(steps + 1):
            model.weight.grad = torch.full_like(model.weight, float(t == 0))
            optimizer.step()
        means.append(optimizer.state[model.weight]["exp_avg_sq"].double().mean().item())
    assert means[0] == pytest.approx(1e-3 * 0.999**steps, rel=0.01)
    assert means[1] == pytest.approx(1e-3, rel=0.01)


@every
def test_a_zero_stays_an_exact_zero(kind: Any, settings: dict[str, Any], backend: str) -> None:
    model, optimizer = built(kind, tr.L1(1000.0), **settings)
    with torch.no_grad():
        model.matrix /= 100
    for t in range(5):
        give_gradients(model, t)
        model.matrix.grad.clamp_(-50, 50)
        optimizer.step()
        if t > 0:
            assert not model.matrix.any()
            assert not model.matrix.signbit().any()


def test_a_weight_rests_exactly_at_an_anchor_that_its_dtype_cannot_hold(backend: str) -> None:
    """1.003 lies between two numbers of bfloat16; w₀ is the nearer one."""
    model = nn.Linear(50, 1, bias=False, dtype=bf16)
    reg = tr.Regularizer(model, tr.L1(10.0), toward={"weight": torch.full((1, 50), 1.003)})
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.5, regularizer=reg)
    for _ in range(5):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        assert (model.weight == 1.0).all()


def test_groups_die_whole_and_the_others_are_rounded_once(backend: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(40, 30, bias=False, dtype=bf16)
    with torch.no_grad():
        model.weight[:5] /= 100
    w = model.weight.detach().double()
    reg = tr.Regularizer(model, tr.GroupLasso(0.3))
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.125, regularizer=reg, rounding=NearestRounding())
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    truth = tr.GroupLasso(0.3).prox(w, 0.125)
    assert (truth == 0).all(1).sum() == 5
    assert ((model.weight == 0) == (truth == 0)).all()
    assert ((model.weight.double() - truth).abs() <= 0.51 * spacing(truth)).all()


# ---------------------------------------------------------------------- the same bits


@needs_native
@pytest.mark.parametrize("rounding", [StochasticRounding(3), NearestRounding()], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_both_backends_give_the_same_bits_where_float32_is_exact(
    rounding: Any, momentum: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All numbers are powers of 2 or short, so that no order of operations can show."""
    ends = []
    for name in AVAILABLE:
        monkeypatch.setenv("TORCHREG_BACKEND", name)
        model, optimizer = built(tr.optim.ProxSGD, tr.L1(0.25), lr=2**-5, momentum=momentum, rounding=rounding)
        for t in range(6):
            generator = torch.Generator().manual_seed(t)
            for w in model.parameters():
                gradient = torch.randint(-16, 17, w.shape, generator=generator) / 8
                w.grad = torch.empty_like(w).copy_(gradient)
            optimizer.step()
        ends.append(model)
    assert equal(*ends)
    assert (ends[0].matrix == 0).any()


@needs_native
@every
def test_elsewhere_they_differ_by_a_spacing_in_one_weight_of_a_thousand(
    kind: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the random number lies within the few roundings of float32 that lie between them."""
    model, optimizer = built(kind, **settings)
    trained(model, optimizer, range(2))
    start, ends = copy.deepcopy((model.state_dict(), optimizer.state_dict())), []
    for name in AVAILABLE:
        monkeypatch.setenv("TORCHREG_BACKEND", name)
        model, optimizer = built(kind, **settings)
        model.load_state_dict(start[0])
        optimizer.load_state_dict(copy.deepcopy(start[1]))
        trained(model, optimizer, range(2, 3))
        state = optimizer.state[model.matrix]
        ends.append([model.matrix.detach(), *(v for k, v in state.items() if k != "step" and isinstance(v, Tensor))])
    for a, b in zip(*ends, strict=True):
        assert (a != b).double().mean() <= 1e-3
        assert ((a.double() - b.double()).abs() <= 1.01 * spacing(torch.maximum(a.abs(), b.abs())) + CANCELLED).all()


@pytest.fixture
def threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@every
def test_any_number_of_threads_gives_the_same_bits(
    kind: Any, settings: dict[str, Any], threads: Any, backend: str
) -> None:
    ends = []
    for count in (1, 2):
        threads(count)
        model, optimizer = built(kind, **settings)
        trained(model, optimizer, range(3))
        ends.append(model)
    assert equal(*ends)


@every
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(kind: Any, settings: dict[str, Any], backend: str) -> None:
    """The key of the random bits is the checkpoint's, whatever the seed of the optimizer that loads it."""
    model, optimizer = built(kind, rounding=StochasticRounding(seed=4), **settings)
    trained(model, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    trained(model, optimizer, range(4, 8))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, resumed = built(kind, rounding=StochasticRounding(seed=5), **settings)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    trained(again, resumed, range(4, 8))
    assert equal(model, again)
    for w, v in zip(model.parameters(), again.parameters(), strict=True):
        for key, value in optimizer.state[w].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(resumed.state[v][key])), key


@every
def test_copies_go_on_with_the_same_rounding(kind: Any, settings: dict[str, Any], backend: str) -> None:
    model, optimizer = built(kind, rounding=StochasticRounding(seed=4), **settings)
    trained(model, optimizer, range(2))
    model2, _, optimizer2 = copy.deepcopy((model, optimizer.regularizer, optimizer))
    model3, optimizer3 = pickle.loads(pickle.dumps((model, optimizer)))
    assert optimizer2.rounding == optimizer3.rounding == StochasticRounding(seed=4)
    trained(model, optimizer, range(2, 5))
    for other, its in ((model2, optimizer2), (model3, optimizer3)):
        trained(other, its, range(2, 5))
        assert equal(model, other)


@pytest.mark.parametrize(("size", "steps"), [(10, 3), (1 << 22, 3)])
def test_weights_go_in_batches_of_any_size(size: int, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHREG_BACKEND", "torch")
    monkeypatch.setattr(low_precision, "AT_ONCE", size)
    model, optimizer = built(tr.optim.ProxAdam)
    trained(model, optimizer, range(steps))
    monkeypatch.setattr(low_precision, "AT_ONCE", 1000)
    again, other = built(tr.optim.ProxAdam)
    trained(again, other, range(steps))
    assert equal(model, again)


def test_another_seed_is_another_run_and_torch_s_generator_is_not_touched(backend: str) -> None:
    before, ends = torch.get_rng_state(), []
    for seed in (0, 0, 1):
        model, optimizer = built(tr.optim.ProxAdam, rounding=StochasticRounding(seed))
        trained(model, optimizer, range(3))
        ends.append(model)
    assert equal(ends[0], ends[1])
    assert (ends[0].matrix != ends[2].matrix).double().mean() > 0.1
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------- the stock classes


@every
def test_checkpoints_load_both_ways_with_the_stock_class(kind: Any, settings: dict[str, Any], backend: str) -> None:
    model, optimizer = built(kind, **settings)
    trained(model, optimizer, range(3))
    stock = STOCK[kind](model.parameters(), lr=0.01, **settings)
    stock.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(model, stock, range(3, 5))
    optimizer.load_state_dict(copy.deepcopy(stock.state_dict()))
    trained(model, optimizer, range(5, 7))
    plain = STOCK[kind](model.parameters(), lr=0.01, **settings)
    trained(model, plain, range(7, 8))
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    trained(model, optimizer, range(8, 10))
    assert all(w.isfinite().all() for w in model.parameters())
    for key, value in optimizer.state[model.matrix].items():
        assert isinstance(value, Tensor | float | int), key
        assert not isinstance(value, Tensor) or value.dtype is (torch.float32 if key == "step" else bf16), key


@every
def test_at_strength_0_it_is_the_stock_step_bit_for_bit(kind: Any, settings: dict[str, Any], backend: str) -> None:
    model, optimizer = built(kind, tr.L1(0.0), **settings)
    plain = Weights(bf16)
    trained(model, optimizer, range(3))
    trained(plain, STOCK[kind](plain.parameters(), lr=0.01, **settings), range(3))
    assert equal(model, plain)


@every
def test_wide_weights_beside_narrow_ones_step_as_ever(
    kind: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHREG_BACKEND", "torch")  # the native one leaves the first step to torch
    ends = []
    for dtype in (torch.float32, bf16):
        model = nn.ModuleDict({"wide": nn.Linear(30, 20), "narrow": nn.Linear(30, 20)})
        model["narrow"].to(dtype)
        for w in model["wide"].parameters():
            nn.init.normal_(w, generator=torch.Generator().manual_seed(0))
        optimizer = kind(model.parameters(), lr=0.01, **settings, regularizer=tr.Regularizer(model, tr.L1(0.05)))
        trained(model, optimizer, range(4))
        ends.append(model["wide"])
    assert equal(*ends)
    assert (ends[0].weight == 0).any()


def test_an_attached_optimizer_says_that_it_rounds_twice() -> None:
    model = nn.Linear(3, 2, dtype=bf16)
    reg = tr.Regularizer(model, tr.L1(0.1))
    handle = tr.optim.attach(Adam(model.parameters()), reg)
    assert "prox (Adam, rounded twice in bfloat16)" in reg.explain()
    handle.remove()
    swap_in = tr.optim.ProxAdam(model.parameters(), regularizer=reg)
    assert "rounded" not in reg.explain()
    assert swap_in.rounding == StochasticRounding()


def test_what_is_no_rounding_is_refused_at_construction() -> None:
    model = nn.Linear(3, 2, dtype=bf16)
    reg = tr.Regularizer(model, tr.L1(0.1))
    with pytest.raises(TypeError, match=r"rounding='nearest' is a str; pass tr\.optim\.StochasticRounding"):
        tr.optim.ProxSGD(model.parameters(), regularizer=reg, rounding="nearest")
    with pytest.raises(TypeError, match=r"seed=0\.5 is a float, not an integer; write seed=0"):
        StochasticRounding(0.5)  # type: ignore[arg-type]
    assert reg().requires_grad, "no route was taken"
