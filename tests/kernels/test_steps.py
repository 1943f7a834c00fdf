"""The native step in one pass against the stock step and the prox after it: the same weights, faster."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchreg as tr
from tests.backends import needs_native
from tests.cases import same_bits
from torchreg.kernels import native
from torchreg.kernels.step_tables import FILLED_IN, AdamNumbers, SGDNumbers
from torchreg.optim.executors import native as native_step
from torchreg.optim.executors.native import NativeExecutor
from torchreg.optim.executors.plain import Plain

pytestmark = needs_native

SETTINGS: list[tuple[Any, dict[str, Any]]] = [
    (tr.optim.ProxSGD, {}),
    (tr.optim.ProxSGD, {"weight_decay": 0.1, "maximize": True}),
    (tr.optim.ProxSGD, {"momentum": 0.9}),
    (tr.optim.ProxSGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (tr.optim.ProxSGD, {"momentum": 0.9, "nesterov": True, "maximize": True}),
    (tr.optim.ProxAdam, {}),
    (tr.optim.ProxAdam, {"betas": (0.3, 0.7), "eps": 1e-3, "weight_decay": 0.1}),
    (tr.optim.ProxAdam, {"betas": (0.0, 0.0)}),
    (tr.optim.ProxAdam, {"amsgrad": True, "maximize": True}),
    (tr.optim.ProxAdamW, {"weight_decay": 0.1}),
    (tr.optim.ProxAdamW, {"fused": True, "amsgrad": True}),
    (tr.optim.ProxAdamW, {"lr": torch.tensor(0.05, dtype=torch.float64)}),
]
PENALTIES = [tr.L1(0.05), tr.L2(0.3), tr.ElasticNet(l1=0.05, l2=0.3)]
MOMENTA = ("momentum_buffer", "exp_avg")
STEPS, BOUND = 6, 4
"""In roundings of the terms that a weight is the sum of: itself, its move and its threshold."""

every_setting = pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=str)
every_penalty = pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: penalty.name)


class Weights(nn.Module):
    """A matrix over a block of the kernel, filters in another memory format, and two too small for a vector."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = {"matrix": (130, 129), "filters": (5, 3, 4, 2), "bias": (7,), "scalars": (1, 3)}
        for name, shape in shapes.items():
            w = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            w = w.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else w
            setattr(self, name, nn.Parameter(w))


def give_gradients(model: nn.Module, t: int) -> None:
    """Gradients over eight powers of ten, the same for every dtype, in the layout of their weights."""
    generator = torch.Generator().manual_seed(t)
    for w in model.parameters():
        exponent = torch.randint(-6, 2, w.shape, generator=generator)
        gradient = torch.randn(w.shape, generator=generator, dtype=torch.float64) * 10.0**exponent
        w.grad = torch.empty_like(w).copy_(gradient)


def made(kind: Any, penalty: tr.Penalty, dtype: torch.dtype, **settings: Any) -> tuple[Weights, Any, Any]:
    toward = settings.pop("toward", False)
    scale = settings.pop("scale", None)
    model = Weights(dtype)
    anchors = {name: torch.full_like(w, 0.5) for name, w in model.named_parameters()} if toward else None
    reg = tr.Regularizer(model, penalty, toward=anchors, scale=scale)
    return model, reg, kind(model.parameters(), **{"lr": 0.05, **settings}, regularizer=reg)


def state_of(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    found = {name: w.detach().double().clone() for name, w in model.named_parameters()}
    for name, w in model.named_parameters():
        for key, value in optimizer.state[w].items():
            found[f"{name}.{key}"] = torch.as_tensor(value, dtype=torch.float64).clone()
    return found


class Served:
    """Which code took each step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by: list[str] = []
        run, plain = NativeExecutor.step, Plain.step

        @functools.wraps(run)
        def counted(*args: Any) -> bool:
            done = run(*args)
            self.by += ["native"] if done else []
            return done

        def plainly(*args: Any) -> bool:
            self.by.append("stock")
            return plain(*args)

        monkeypatch.setattr(NativeExecutor, "step", counted)
        monkeypatch.setattr(Plain, "step", plainly)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setenv("TORCHREG_BACKEND", "native")
    return Served(monkeypatch)


# ---------------------------------------------------------------------- the same weights


@pytest.mark.parametrize("toward", [False, True], ids=["to zero", "toward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_penalty
@every_setting
def test_a_step_is_that_of_float64_to_a_few_roundings(
    kind: Any,
    settings: dict[str, Any],
    penalty: tr.Penalty,
    dtype: torch.dtype,
    toward: bool,
    served: Served,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The truth is the stock step in float64, then the prox; each step starts from the native state."""
    model, _, optimizer = made(kind, penalty, dtype, toward=toward, **settings)
    truth, _, exact = made(kind, penalty, torch.float64, toward=toward, **settings)
    eps, zeros = torch.finfo(dtype).eps, 0
    for t in range(STEPS):
        exact.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before = state_of(model, optimizer)
        with torch.no_grad():
            for w, v in zip(truth.parameters(), model.parameters(), strict=True):
                w.copy_(v)
        give_gradients(model, t)
        for w, v in zip(truth.parameters(), model.parameters(), strict=True):
            w.grad = torch.empty_like(w).copy_(v.grad)
        optimizer.step()
        monkeypatch.setenv("TORCHREG_BACKEND", "torch")
        exact.step()
        monkeypatch.setenv("TORCHREG_BACKEND", "native")
        found, expected = state_of(model, optimizer), state_of(truth, exact)
        assert found.keys() == expected.keys()
        if served.by[-2:] == ["stock", "stock"]:
            continue
        gradients = {name: w.grad.double() for name, w in model.named_parameters()}
        for key, value in expected.items():
            name, _, entry = key.partition(".")
            # The terms of a sum: of a weight also its move, of order lr; of a momentum the gradient with its decay.
            size = value.abs() + before[key].abs()
            size += 1.0 if not entry else gradients[name].abs() + before[name].abs() if entry in MOMENTA else 0.0
            assert ((found[key] - value).abs() <= BOUND * eps * size).all(), f"{key} at step {t}"
        zeros += int((expected["matrix"] == 0.5 * toward).sum())
        different = (found["matrix"] == 0.5 * toward) != (expected["matrix"] == 0.5 * toward)
        assert penalty.name == "l2" or different.sum() <= 2, (
            "zeros differ where the threshold is within a rounding alone"
        )
    first = settings.get("momentum", kind is not tr.optim.ProxSGD) != 0  # which builds the state
    assert served.by.count("native") == STEPS - first
    assert penalty.name == "l2" or zeros > 100


@every_setting
def test_a_run_has_the_zeros_and_weights_of_the_stock_code(
    kind: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for backend in ("native", "torch"):
        monkeypatch.setenv("TORCHREG_BACKEND", backend)
        model, _, optimizer = made(kind, tr.L1(0.05), torch.float64, scale=lambda name, w: 1 + w.dim(), **settings)
        for t in range(30):
            give_gradients(model, t)
            optimizer.step()
        found.append(state_of(model, optimizer))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-9, atol=1e-10)
        assert torch.equal(value == 0, found[1][name] == 0), name
    assert (found[0]["matrix"] == 0).any()


@every_setting
def test_any_number_of_threads_gives_the_same_bits(
    kind: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHREG_BACKEND", "native")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            model, _, optimizer = made(kind, tr.ElasticNet(l1=0.05, l2=0.1), torch.float32, **settings)
            for t in range(3):
                give_gradients(model, t)
                optimizer.step()
            found.append(model.matrix.detach())
    finally:
        torch.set_num_threads(before)
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


@pytest.fixture(scope="module")
def scalar(tmp_path_factory: pytest.TempPathFactory) -> native.Library:
    """The kernels compiled without optimization, as plain C: no vectors, no root or division in parallel."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no compiler here")
    target = tmp_path_factory.mktemp("scalar") / "scalar.so"
    source = native.FILE.with_name("native.c")
    flags = ["-std=c11", "-O0", "-ffp-contract=off", "-DEVERY_PROCESSOR="]  # the least of its kind alone
    subprocess.run([compiler, *flags, "-shared", "-fPIC", source, "-o", target, "-lm"], check=True)
    library = native.load(target)
    assert isinstance(library, native.Library)
    return library


@every_setting
def test_every_processor_gives_the_same_bits(
    kind: Any, settings: dict[str, Any], scalar: native.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its vectors are: no sum is contracted, and no root is approximate."""
    monkeypatch.setenv("TORCHREG_BACKEND", "native")
    found = []
    for library in (native.load(), scalar):
        monkeypatch.setattr(native_step, "native", lambda library=library: library)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            model, _, optimizer = made(kind, tr.ElasticNet(l1=0.05, l2=0.1), dtype, **settings)
            for t in range(4):
                give_gradients(model, t)
                optimizer.step()
            found.append([w.double() for w in model.parameters()])
    for dtypes in range(3):
        assert all(map(same_bits, found[dtypes], found[dtypes + 3]))


# ---------------------------------------------------------------------- the numbers at the edge


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@every_setting
def test_what_is_not_finite_stays_where_it_is_and_spreads_to_no_neighbour(
    kind: Any, settings: dict[str, Any], dtype: torch.dtype, served: Served
) -> None:
    model, _, optimizer = made(kind, tr.L1(0.05), dtype, **settings)
    give_gradients(model, 0)
    optimizer.step()
    give_gradients(model, 1)
    model.matrix.grad[3, 5] = torch.nan
    optimizer.step()
    assert served.by[-1] == "native"
    assert model.matrix.isnan().nonzero().tolist() == [[3, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("kind", "settings"), [SETTINGS[2], SETTINGS[5], SETTINGS[8]], ids=str)
def test_moments_of_dead_weights_fade_to_zero_and_no_others(
    kind: Any, settings: dict[str, Any], dtype: torch.dtype, served: Served
) -> None:
    """A live weight with a denormal moment keeps it, as in the stock class."""
    model, _, optimizer = made(kind, tr.L1(1e-14), dtype, **settings)
    tiny = torch.finfo(dtype).smallest_normal
    give_gradients(model, 0)
    optimizer.step()
    with torch.no_grad():
        model.matrix[0] = 0.0
        for key, value in optimizer.state[model.matrix].items():
            if isinstance(value, Tensor) and value.dim() and not key.startswith("max"):
                value.copy_(tiny * 0.5)
    for _ in range(17):
        for w in model.parameters():
            w.grad = torch.zeros_like(w)
        optimizer.step()
    assert set(served.by[1:]) == {"native"}
    for key, value in optimizer.state[model.matrix].items():
        if isinstance(value, Tensor) and value.dim() and not key.startswith("max"):
            assert (value[0] == 0).all(), key
            assert (value[1:] != 0).all(), key


def test_zeros_are_positive_zeros(served: Served) -> None:
    model, _, optimizer = made(tr.optim.ProxSGD, tr.L1(100.0), torch.float32)
    give_gradients(model, 0)
    optimizer.step()
    assert served.by == ["native"]
    assert not model.matrix.signbit().any()
    assert not model.matrix.any()


# ---------------------------------------------------------------------- who serves


def test_strength_zero_is_left_to_the_stock_code(served: Served) -> None:
    model, reg, optimizer = made(tr.optim.ProxAdam, tr.L1(0.05), torch.float32)
    for strength in (0.05, 0.0, 0.05):
        reg["l1"].strength = strength
        give_gradients(model, 0)
        optimizer.step()
    with reg.disabled():
        optimizer.step()
    optimizer.step()
    assert served.by == ["stock", "stock", "native", "stock", "native"]


class Own(tr.L1):
    """A prox of its own, which inherits from one that the kernel knows."""

    name = "own"

    def prox_map(self, w: Tensor, step: Any) -> Tensor:
        return torch.zeros_like(w)


def make_sparse(model: Any) -> None:
    model.matrix.grad = model.matrix.grad.to_sparse()


def make_strided(model: Any) -> None:
    model.matrix.grad = model.matrix.grad.t().contiguous().t()


def scale(model: Any, optimizer: Any) -> None:
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(0.0)


NOT_SERVED: dict[str, dict[str, Any]] = {
    "a prox of one's own": {"penalty": Own(0.05)},
    "groups": {"penalty": tr.GroupLasso(0.05), "include": "matrix"},
    "float16": {"dtype": torch.float16},
    "complex": {"dtype": torch.complex64},
    "foreach asked for": {"foreach": True},
    "no fused step asked for": {"fused": False},
    "gradients in another order": {"change": make_strided},
    "sparse gradients": {"change": make_sparse, "include": "filters"},
    "a fused step of a GradScaler": {"fused": True, "scaled": True},
}


@pytest.mark.parametrize("case", NOT_SERVED)
def test_all_else_is_left_to_the_stock_code(case: str, served: Served) -> None:
    asked = dict(NOT_SERVED[case])
    change, scaled = asked.pop("change", None), asked.pop("scaled", False)
    model = Weights(asked.pop("dtype", torch.float32))
    reg = tr.Regularizer(model, asked.pop("penalty", tr.L1(0.05)), include=asked.pop("include", None))
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=reg, **asked)
    for t in range(2):
        give_gradients(model, t)
        if change is not None:
            change(model)
        if scaled:
            scale(model, optimizer)
        optimizer.step()
    assert served.by == ["stock", "stock"]
    assert all(w.isfinite().all() for w in model.parameters())


def test_without_the_library_the_stock_code_serves(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHREG_BACKEND", "torch")
    model, _, optimizer = made(tr.optim.ProxSGD, tr.L1(0.05), torch.float32)
    give_gradients(model, 0)
    optimizer.step()
    assert served.by == ["stock"]


# ---------------------------------------------------------------------- kept tables


def new_strength(model: Any, reg: Any, optimizer: Any) -> None:
    reg["l1"].strength = 0.4


def new_lr(model: Any, reg: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = 0.3


def lr_in_place(model: Any, reg: Any, optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] = torch.tensor(0.05, dtype=torch.float64)
    give_gradients(model, 50)
    optimizer.step()
    optimizer.param_groups[0]["lr"].fill_(0.4)


def new_momentum(model: Any, reg: Any, optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    group.update({"betas": (0.5, 0.9)} if "betas" in group else {"momentum": 0.5})


def new_data(model: Any, reg: Any, optimizer: Any) -> None:
    model.matrix.data = model.matrix.data * 2


def new_state(model: Any, reg: Any, optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def no_state(model: Any, reg: Any, optimizer: Any) -> None:
    optimizer.state.clear()


def a_new_buffer(model: Any, reg: Any, optimizer: Any) -> None:
    state = optimizer.state[model.matrix]
    for key, value in state.items():
        state[key] = value + 1 if isinstance(value, Tensor) and value.dim() else value


def moved_buffers(model: Any, reg: Any, optimizer: Any) -> None:
    for value in optimizer.state[model.filters].values():
        if isinstance(value, Tensor):
            value.data = value.data.clone()


def fewer_parameters(model: Any, reg: Any, optimizer: Any) -> None:
    model.matrix.requires_grad_(False)


def more_parameters(model: Any, reg: Any, optimizer: Any) -> None:
    model.more = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [model.more], "lr": 0.2})


def a_double_cast(model: Any, reg: Any, optimizer: Any) -> None:
    model.float()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


CHANGES = [
    *(new_strength, new_lr, lr_in_place, new_momentum, new_data, new_state, no_state, a_new_buffer, moved_buffers),
    *(fewer_parameters, more_parameters, a_double_cast),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize(("kind", "settings"), [SETTINGS[2], SETTINGS[5]], ids=str)
def test_a_change_between_steps_reaches_the_next_step(
    kind: Any, settings: dict[str, Any], change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for backend in ("native", "torch"):
        monkeypatch.setenv("TORCHREG_BACKEND", backend)
        model, reg, optimizer = made(kind, tr.L1(0.05), torch.float64, **settings)
        for t in range(8):
            if t == 4:
                change(model, reg, optimizer)
            give_gradients(model, t)
            for w in model.parameters():
                w.grad = w.grad if w.requires_grad else None
            optimizer.step()
        found.append({name: w.detach().double() for name, w in model.named_parameters()})
    tolerance = 1e-5 if change is a_double_cast else 1e-10
    for name, w in found[0].items():
        torch.testing.assert_close(w, found[1][name], rtol=tolerance, atol=tolerance)


def test_a_graph_that_saved_a_weight_knows_that_the_step_changed_it(served: Served) -> None:
    model, _, optimizer = made(tr.optim.ProxSGD, tr.L1(0.05), torch.float32)
    loss = model.matrix.square().sum()
    give_gradients(model, 0)
    optimizer.step()
    assert served.by == ["native"]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_copy_has_tables_of_its_own(served: Served) -> None:
    model, reg, optimizer = made(tr.optim.ProxAdam, tr.L1(0.05), torch.float32)
    for t in range(2):
        give_gradients(model, t)
        optimizer.step()
    before = model.matrix.detach().clone()
    model2, _, optimizer2 = copy.deepcopy((model, reg, optimizer))
    for t in range(2, 4):
        give_gradients(model2, t)
        optimizer2.step()
    assert served.by[-2:] == ["native", "native"]
    assert torch.equal(model.matrix, before)
    assert not torch.equal(model2.matrix, before)


def test_the_first_native_step_after_a_stock_checkpoint_is_the_right_one(served: Served) -> None:
    """One step of torch's own finds where the momentum of the prox stands."""
    model, reg, optimizer = made(tr.optim.ProxSGD, tr.L1(0.0), torch.float64, momentum=0.9)
    for w in model.parameters():
        w.grad = torch.zeros_like(w)
    stock = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    stock.step()
    optimizer.load_state_dict(stock.state_dict())
    reg["l1"].strength = 0.01
    before = model.matrix.detach().clone()
    for _ in range(2):
        optimizer.step()
    assert served.by == ["stock", "native"]
    moved = (before.abs() - model.matrix.detach().abs())[before.abs() > 0.1]
    np.testing.assert_allclose(moved.numpy(), 2 * 0.05 * 0.01 / (1 - 0.9), rtol=1e-9)


def test_the_tables_are_as_wide_as_the_kernel_reads_them() -> None:
    """A field too few on either side would read beyond the end of a row."""
    source = native.FILE.with_name("native.c").read_text(encoding="utf-8")
    for name, kind in (("adam", AdamNumbers), ("sgd", SGDNumbers)):
        struct = source[: source.index(f"}} {name}_numbers;")].rpartition("typedef struct {")[2]
        fields = [word.strip() for line in struct.split(";") for word in line.replace("double", "").split(",")]
        fields = [word for word in fields if word]
        assert fields[: len(kind._fields)] == list(kind._fields)
        assert len(fields) == len(kind._fields) + FILLED_IN[kind]


@pytest.mark.parametrize("swap_in", [tr.optim.ProxSGD, tr.optim.ProxAdam], ids=lambda kind: kind.__name__)
def test_a_strength_that_moves_at_every_step_is_that_of_the_step(swap_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A schedule of λ writes numbers into the tables, and makes them anew only where more has changed."""
    made = []
    before = NativeExecutor._build
    monkeypatch.setattr(NativeExecutor, "_build", lambda self, *args: made.append(1) or before(self, *args))
    ends = []
    for backend in ("native", "torch"):
        monkeypatch.setenv("TORCHREG_BACKEND", backend)
        torch.manual_seed(0)
        model = torch.nn.Linear(40, 30)
        reg = tr.Regularizer(model, {"weight": tr.ElasticNet(l1=0.5, l2=0.1), "bias": tr.L1(0.2)})
        optimizer = swap_in(model.parameters(), lr=0.01, regularizer=reg)
        for step in range(12):
            reg["weight"].factor = step / 6
            reg["bias"].strength = 0.2 if step < 8 else 0.0
            for w in model.parameters():
                w.grad = torch.sin(torch.arange(w.numel()) * (step + 1.0)).reshape(w.shape)
            optimizer.step()
        ends.append([w.detach().clone() for w in model.parameters()])
    for fast, plain in zip(*ends, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-7)
        assert torch.equal(fast == 0, plain == 0)
    assert bool((ends[0][0] == 0).any())
    # The first step is the stock one; the tables are made for the second, and in the rest only written into.
    assert len(made) <= 3


def test_the_profiler_sees_the_step_and_hooks_may_come_and_go() -> None:
    model = torch.nn.Linear(4, 3)
    reg = tr.Regularizer(model, tr.L1(0.1))
    optimizer = tr.optim.ProxAdam(model.parameters(), regularizer=reg)
    model(torch.ones(2, 4)).sum().backward()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#ProxAdam.step" in {event.key for event in profile.key_averages()}
    fired = []
    handle = optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    optimizer.step()
    handle.remove()
    optimizer.step()
    assert fired == ["pre"]


@pytest.mark.parametrize("swap_in", [tr.optim.ProxSGD, tr.optim.ProxAdam], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("change", ["a parameter moves to another group", "the count of steps is replaced"])
def test_what_the_user_edits_in_groups_and_state_is_noticed(
    swap_in: Any, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for backend in ("native", "torch"):
        monkeypatch.setenv("TORCHREG_BACKEND", backend)
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))
        a, b, c = model.parameters()
        groups = [{"params": [a, b], "weight_decay": 0.5}, {"params": [c], "weight_decay": 0.0}]
        optimizer = swap_in(groups, lr=0.1, regularizer=tr.Regularizer(model, tr.L1(1e-4)))
        for t in range(12):
            if t == 4 and change.startswith("a parameter"):
                for group, params in zip(optimizer.param_groups, ([a], [b, c]), strict=True):
                    group["params"] = params
            elif t == 4:
                for state in optimizer.state.values():
                    state.update({"step": torch.zeros(())} if "step" in state else {})
            for w in (a, b, c):
                w.grad = torch.full_like(w, 0.01)
            optimizer.step()
        ends.append(model.state_dict())
    for name, w in ends[1].items():
        torch.testing.assert_close(ends[0][name], w, rtol=1e-5, atol=1e-6)
