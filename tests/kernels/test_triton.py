"""Triton's step in one pass against the stock step and the prox after it: the same weights, on the device alone.

Where there is no GPU, one test runs this file once more, with the kernels interpreted on the CPU.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import torchreg as tr
from tests import ROOT
from tests.cases import same_bits, weights
from tests.kernels import test_steps as steps
from tests.kernels.test_l1l2 import exactly
from tests.kernels.test_steps import BOUND, MOMENTA, SETTINGS, give_gradients, state_of
from tests.models import TORCH
from torchreg.kernels import backend as choice
from torchreg.kernels import l1l2
from torchreg.optim.executors import native
from torchreg.optim.executors.plain import Plain
from torchreg.optim.executors.triton import TritonExecutor
from torchreg.penalties.coefficients import L1L2

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

needs_kernels = pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="no GPU: run below, interpreted")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here")
needs_new_triton = pytest.mark.skipif(TORCH < (2, 7), reason="Triton 3.2 is compiled, and watched, in another way")
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed")

SGD, ADAM = (tr.optim.ProxSGD, {"momentum": 0.9}), (tr.optim.ProxAdam, {})
L1, BOTH = tr.L1(0.3), tr.ElasticNet(l1=0.3, l2=0.3)
FUSED = [(tr.optim.ProxSGD, {"momentum": 0.9, "fused": True}), (tr.optim.ProxAdamW, {"amsgrad": True, "fused": True})]


class Weights(nn.Module):
    """A matrix over a block of the kernel, filters in another memory format, and one too small for a vector."""

    shapes: ClassVar[dict[str, tuple[int, ...]]] = {"matrix": (70, 33), "filters": (5, 3, 4, 2), "scalars": (1, 3)}

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in self.shapes.items():
            w = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
            w = w.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else w
            setattr(self, name, nn.Parameter(w))


class Small(Weights):
    shapes: ClassVar[dict[str, tuple[int, ...]]] = {"matrix": (9, 7), "filters": (2, 3, 1, 2)}


def made(kind: Any, penalty: tr.Penalty, dtype: torch.dtype, of: Any = Weights, **settings: Any) -> Any:
    toward, model = settings.pop("toward", False), of(dtype)
    anchors = {name: torch.full_like(w, 0.5) for name, w in model.named_parameters()} if toward else None
    reg = tr.Regularizer(model, penalty, toward=anchors)
    return model, reg, kind(model.parameters(), **{"lr": 0.05, **settings}, regularizer=reg)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which code took each step; Triton is forced."""
    by: list[str] = []
    run, plain = TritonExecutor.step, Plain.step

    def counted(self: Any, *args: Any) -> bool:
        done = run(self, *args)
        by.extend(["triton"] if done else [])
        return done

    def plainly(*args: Any) -> bool:
        by.append("stock")
        return plain(*args)

    monkeypatch.setattr(TritonExecutor, "step", counted)
    monkeypatch.setattr(Plain, "step", plainly)
    monkeypatch.setenv("TORCHREG_BACKEND", "triton")
    return by


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is that run")
def test_interpreted_on_the_cpu_the_kernels_pass_all_of_this_file() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = ROOT
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-5000:]


@needs_triton
@needs_new_triton
@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled here")
@pytest.mark.parametrize("name", ["adam", "sgd", "soft"])
def test_the_kernels_compile_for_a_gpu_that_is_not_here(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 bytes at a time, and every operation rounded to nearest by itself, as the native kernels do."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from torchreg.kernels import cuda

    def compiled(kernel: Any, pointers: dict[str, str], **constants: Any) -> str:
        signature = {**pointers, **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        options = {"num_warps": 4, "enable_fp_fusion": False}
        return triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options).asm["ptx"]

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtype = torch.bfloat16 if name == "sgd" else torch.float32
    real, work = cuda.DTYPES[dtype]
    table = {"addresses": "*i64", "numbers": "*fp64"}
    common = {"REAL": real, "ALIGNED": True, "BLOCK": cuda.BLOCK}
    if name == "soft":
        pointers = {**table, "blocks": "*i64", "slope": "*fp32", "sums": "*fp64"}
        found = compiled(cuda.kernels.soft, pointers, TASK=l1l2.BOTH, **common)
    else:
        step, scaler = getattr(cuda, name), {"found_inf": "*fp32", "grad_scale": "*fp32"}
        widths = {"ADDRESSES": step.addresses, "NUMBERS": step.numbers}
        pointers = {**table, "blocks": "*i64", **scaler}
        found = compiled(cuda.kernels.step, pointers, OF_BLOCK=step.of_block, WORK=work, **common, **widths)
        compiled(step.prepare, {**table, "rows": "i32", "found_inf": "*fp32"}, LANES=cuda.LANES)
    assert re.search(r"ld\.global\.v4\.b32", found)
    assert re.search(r"st\.global\.v4\.b32", found)
    assert not re.search(r"\bfma\.|\.ftz|div\.full|approx", found)
    assert dtype is torch.float32 or "cvt.rn.bf16" in found


# ---------------------------------------------------------------------- the same weights

FLOAT32 = [(*setting, penalty, torch.float32) for setting in SETTINGS for penalty in (L1, BOTH)]
FLOAT64 = [(*SETTINGS[i], BOTH, torch.float64) for i in (1, 4, 8, 9)]
EVERY = [*FLOAT32, *FLOAT64, (*SGD, tr.L2(0.3), torch.float32)]


@needs_kernels
@pytest.mark.parametrize(("kind", "settings", "penalty", "dtype"), EVERY, ids=str)
def test_a_step_is_that_of_float64_to_a_few_roundings(
    kind: Any,
    settings: dict[str, Any],
    penalty: tr.Penalty,
    dtype: torch.dtype,
    served: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The truth is the stock step in float64, then the prox; each step starts from the state of the kernel."""
    toward = penalty is BOTH
    model, _, optimizer = made(kind, penalty, dtype, toward=toward, **settings)
    truth, _, exact = made(kind, penalty, torch.float64, toward=toward, **settings)
    eps, beta2 = torch.finfo(dtype).eps, settings.get("betas", (0.9, 0.999))[1]
    for t in range(3):
        exact.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        before = state_of(model, optimizer)
        give_gradients(model, t)
        with torch.no_grad():
            for w, v in zip(truth.parameters(), model.parameters(), strict=True):
                w.copy_(v)
                w.grad = torch.empty_like(w).copy_(v.grad)
        monkeypatch.setenv("TORCHREG_BACKEND", "triton")
        optimizer.step()
        monkeypatch.setenv("TORCHREG_BACKEND", "torch")
        exact.step()
        if served[-2:] == ["stock", "stock"]:
            continue
        found, expected = state_of(model, optimizer), state_of(truth, exact)
        gradients = {name: w.grad.double() for name, w in model.named_parameters()}
        for key, value in expected.items():
            name, _, entry = key.partition(".")
            if entry == "unit_momentum" and key not in found:
                continue  # a fused step counts on the device, and needs none
            size = value.abs() + before[key].abs()
            size += 1.0 if not entry else gradients[name].abs() + before[name].abs() if entry in MOMENTA else 0.0
            # In float64 the truth itself is off: 1 − β₂ᵗ cancels in it.
            size += 0.05 / (1 - beta2) if not entry and dtype is torch.float64 else 0.0
            assert ((found[key] - value).abs() <= BOUND * eps * size).all(), f"{key} at step {t}"
        different = (found["matrix"] == 0.5 * toward) != (expected["matrix"] == 0.5 * toward)
        assert penalty.name == "l2" or different.sum() <= 2  # where the threshold is within a rounding alone
    first = settings.get("momentum", kind is not tr.optim.ProxSGD) != 0  # which builds the state
    assert served.count("triton") == 3 - first
    assert penalty.name == "l2" or (found["matrix"] == 0.5 * toward).sum() > 10


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("kind", "settings"), [SGD, (ADAM[0], {"eps": 1e-3})], ids=str)
def test_narrow_weights_are_computed_in_float32_and_rounded_once(
    kind: Any, settings: dict[str, Any], dtype: torch.dtype, served: list[str]
) -> None:
    model, _, optimizer = made(kind, L1, dtype, rounding=tr.optim.NearestRounding(), **settings)
    wide, _, exact = made(kind, L1, torch.float32, **settings)
    give_gradients(model, 0)
    optimizer.step()
    for w in wide.parameters():
        w.grad = torch.zeros_like(w)
    exact.step()  # whose state is now replaced
    exact.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    give_gradients(model, 1)
    for w, v in zip(wide.parameters(), model.parameters(), strict=True):
        w.data.copy_(v.data)
        w.grad = torch.empty_like(w).copy_(v.grad)
    optimizer.step()
    exact.step()
    assert served == ["stock", "stock", "triton", "triton"]
    for w, v in zip(wide.parameters(), model.parameters(), strict=True):
        if dtype is torch.bfloat16 and INTERPRETED:  # Triton's interpreter cuts off what a GPU rounds
            torch.testing.assert_close(w, v.float(), rtol=torch.finfo(dtype).eps, atol=0)
        else:
            assert same_bits(w.detach().to(dtype), v.detach())
    assert (model.matrix == 0).any()
    optimizer.rounding = tr.optim.StochasticRounding()
    optimizer.step()
    assert served[4:] == ["stock"]  # no kernel rounds by chance


@needs_kernels
def test_the_count_that_random_bits_leave_behind_is_no_momentum(
    served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for backend in ("torch", "triton"):
        monkeypatch.setenv("TORCHREG_BACKEND", backend)
        model, _, optimizer = made(tr.optim.ProxSGD, L1, torch.bfloat16, of=Small, momentum=0.9, fused=True)
        for t in range(4):
            if t == 2:
                optimizer.rounding = tr.optim.NearestRounding()
            give_gradients(model, t)
            optimizer.step()
        found.append([w.detach() for w in model.parameters()])
    assert served[-2:] == ["triton", "triton"]
    for w, v in zip(*found, strict=True):
        torch.testing.assert_close(w, v, rtol=2 * torch.finfo(torch.bfloat16).eps, atol=2e-3)
    assert (found[1][0] == 0).any()


@needs_kernels
@pytest.mark.parametrize(("kind", "settings"), [SETTINGS[0], SETTINGS[4], SETTINGS[8]], ids=str)
def test_a_run_has_the_zeros_and_weights_of_the_stock_code(
    kind: Any, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for backend in ("triton", "torch"):
        monkeypatch.setenv("TORCHREG_BACKEND", backend)
        model, _, optimizer = made(kind, L1, torch.float64, of=Small, **settings)
        for t in range(12):
            give_gradients(model, t)
            optimizer.step()
        found.append(state_of(model, optimizer))
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-9, atol=1e-10)
        assert torch.equal(value == 0, found[1][name] == 0), name
    assert (found[0]["matrix"] == 0).any()


@needs_kernels
@pytest.mark.parametrize(("kind", "settings"), [SGD, ADAM], ids=str)
def test_what_is_not_finite_stays_where_it_is_and_zeros_are_positive(
    kind: Any, settings: dict[str, Any], served: list[str]
) -> None:
    model, _, optimizer = made(kind, tr.L1(2.0), torch.float32, **settings)
    for t in range(2):
        give_gradients(model, t)
        if t == 1:
            model.matrix.grad[3, 5] = torch.nan
        optimizer.step()
    assert served == ["stock", "triton"]
    assert model.matrix.isnan().nonzero().tolist() == [[3, 5]]
    zeros = model.matrix == 0
    assert zeros.any()
    assert not model.matrix[zeros].signbit().any()


# ---------------------------------------------------------------------- tables of many tensors


class Many(nn.Module):
    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(size, generator=generator).to(DEVICE) for size in sizes]
        self.all = nn.ParameterList(map(nn.Parameter, weights))


@needs_kernels
@needs_new_triton
@pytest.mark.parametrize(("kind", "settings"), [SGD, ADAM], ids=str)
def test_many_tensors_of_odd_sizes_take_two_launches(
    kind: Any, settings: dict[str, Any], served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than a program of the preparation takes, empty ones among them, one of a full block, some unregularized."""
    from torchreg.kernels import cuda

    sizes = [0, 1, 3, 5, 2047, 2048, 2049, 0, 7, 6]
    monkeypatch.setattr(cuda, "LANES", 4)
    launches: list[str] = []
    for name, kernel in vars(cuda.kernels).items():
        if hasattr(kernel, "run"):
            run = kernel.run
            monkeypatch.setattr(kernel, "run", lambda *a, _n=name, _r=run, **k: launches.append(_n) or _r(*a, **k))
    ends = []
    for backend in ("triton", "torch"):
        monkeypatch.setenv("TORCHREG_BACKEND", backend)
        model = Many(sizes)
        names = [f"all.{i}" for i in range(len(sizes)) if i % 3]
        reg = tr.Regularizer(model, L1, include=names)
        optimizer = kind(model.parameters(), lr=0.05, regularizer=reg, **settings)
        for t in range(3):
            give_gradients(model, t)
            launches.clear()
            optimizer.step()
            if backend == "triton" and t == 2:
                assert sorted(launches) == [f"prepare_{kind.__name__[4:].lower()}", "step"]
        ends.append([w.detach() for w in model.parameters()])
    assert served.count("triton") == 2
    for i, (fast, plain) in enumerate(zip(*ends, strict=True)):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-6)
        assert torch.equal(fast == 0, plain == 0), i


@needs_kernels
@needs_new_triton
def test_what_does_not_begin_at_16_bytes_is_stepped_too(served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from torchreg.kernels import cuda

    aligned: list[bool] = []
    run = cuda.kernels.step.run
    monkeypatch.setattr(cuda.kernels.step, "run", lambda *a, **k: aligned.append(k["ALIGNED"]) or run(*a, **k))
    memory = torch.linspace(-1, 1, 5000, device=DEVICE)
    model = nn.Module()
    model.w = nn.Parameter(memory[1:4098])
    reg = tr.Regularizer(model, L1, include="w")
    optimizer = tr.optim.ProxSGD([model.w], lr=0.5, regularizer=reg)
    before = model.w.detach().clone()
    model.w.grad = torch.zeros_like(model.w)
    optimizer.step()
    assert served == ["triton"]
    assert not aligned[-1]
    expected = before.sign() * (before.abs() - 0.15).clamp(min=0)
    torch.testing.assert_close(model.w.detach(), expected)
    assert torch.equal(memory[[0, 4098]], torch.linspace(-1, 1, 5000, device=DEVICE)[[0, 4098]])


@needs_kernels
def test_nothing_is_sent_where_nothing_has_changed(served: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from torchreg.kernels import cuda

    sent: list[int] = []
    send = cuda._send
    monkeypatch.setattr(cuda, "_send", lambda content, *rest: sent.append(len(content)) or send(content, *rest))
    model, reg, optimizer = made(*SGD[:1], L1, torch.float32, of=Small, **SGD[1])
    give_gradients(model, 0)
    for t in range(4):
        if t == 3:
            reg["l1"].strength = 0.1
        optimizer.step()
    assert served == ["stock", "triton", "triton", "triton"]
    assert len(sent) == 2


# ---------------------------------------------------------------------- numbers on the device


@needs_kernels
@pytest.mark.parametrize(("kind", "settings"), FUSED, ids=str)
def test_a_step_that_the_scaler_skips_changes_nothing_and_others_unscale(
    kind: Any, settings: dict[str, Any], served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's fused step does it, with the prox after it: the count and the momentum of the prox are skipped too."""
    ends = []
    for backend in ("triton", "torch"):
        monkeypatch.setenv("TORCHREG_BACKEND", backend)
        model, _, optimizer = made(kind, L1, torch.float32, **settings)
        for t in range(5):
            give_gradients(model, t)
            unscaled = model.matrix.grad.clone()
            if t:
                for w in model.parameters():
                    w.grad.mul_(8.0)
                optimizer.grad_scale = torch.tensor(8.0, device=DEVICE)
                optimizer.found_inf = torch.tensor(float(t == 3), device=DEVICE)
            before = state_of(model, optimizer)
            optimizer.step()
            if backend == "triton" and t == 3:
                after = state_of(model, optimizer)
                assert all(same_bits(after[key], value) for key, value in before.items())
            if backend == "triton" and t == 4:
                assert same_bits(model.matrix.grad, unscaled)
        ends.append(state_of(model, optimizer))
    assert served[:5] == ["stock", *["triton"] * 4]
    for key, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][key], rtol=1e-5, atol=1e-6)
    assert torch.equal(ends[0]["matrix"] == 0, ends[1]["matrix"] == 0)
    assert (ends[0]["matrix"] == 0).any()
    if kind is tr.optim.ProxAdamW:
        assert float(ends[0]["matrix.step"]) == 4


@needs_kernels
def test_counts_and_lr_are_read_where_a_capturable_step_keeps_them(
    served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for backend in ("triton", "torch"):
        monkeypatch.setenv("TORCHREG_BACKEND", backend)
        capturable = DEVICE == "cuda"
        model, _, optimizer = made(tr.optim.ProxAdam, L1, torch.float32, capturable=capturable)
        lr = torch.tensor(0.05, device=DEVICE)
        optimizer.param_groups[0]["lr"] = lr
        for t in range(4):
            # Torch refuses it on a CPU, where the kernel is interpreted.
            optimizer.param_groups[0]["capturable"] = capturable or (backend == "triton" and t > 0)
            give_gradients(model, t)
            if t == 2:
                lr.fill_(0.2)
            if t == 3:
                optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device=DEVICE)
            optimizer.step()
        ends.append(state_of(model, optimizer))
    assert served.count("triton") == 3
    assert float(ends[0]["matrix.step"]) == 4
    for key in ends[0].keys() & ends[1].keys():
        torch.testing.assert_close(ends[0][key], ends[1][key], rtol=1e-5, atol=1e-6)
    assert (ends[0]["matrix"] == 0).any()


@needs_kernels
def test_a_checkpoint_and_another_backend_go_on_with_the_momentum(
    served: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ends = []
    for plan in (["torch"] * 8, ["triton"] * 3 + ["load"] + ["torch"] * 2 + ["triton"] * 3):
        model, _, optimizer = made(tr.optim.ProxSGD, L1, torch.float32, of=Small, momentum=0.9, nesterov=True)
        t = 0
        for what in plan:
            if what == "load":
                torch.save(optimizer.state_dict(), tmp_path / "state.pt")
                optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
                continue
            monkeypatch.setenv("TORCHREG_BACKEND", what)
            give_gradients(model, t)
            optimizer.step()
            t += 1
        ends.append(state_of(model, optimizer))
    assert served[8:] == ["stock", *["triton"] * 2, *["stock"] * 2, *["triton"] * 3]
    for key, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][key], rtol=1e-5, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("change", steps.CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps_reaches_the_next_step(
    change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_state = {steps.new_momentum, steps.a_new_buffer}
    for kind, settings in [ADAM, SGD] if change in of_state else [ADAM]:
        found = []
        for backend in ("triton", "torch"):
            monkeypatch.setenv("TORCHREG_BACKEND", backend)
            model, reg, optimizer = made(kind, L1, torch.float64, of=Small, **settings)
            for t in range(4):
                if t == 2:
                    change(model, reg, optimizer)
                    model.to(DEVICE)
                give_gradients(model, t)
                for w in model.parameters():
                    w.grad = w.grad if w.requires_grad else None
                optimizer.step()
            found.append({name: w.detach().double() for name, w in model.named_parameters()})
        tolerance = 1e-5 if change is steps.a_double_cast else 1e-10
        for name, w in found[0].items():
            torch.testing.assert_close(w, found[1][name], rtol=tolerance, atol=tolerance)


@needs_kernels
@pytest.mark.skipif(not INTERPRETED, reason="a GPU captures in earnest, below")
def test_a_captured_step_reads_memory_that_no_other_step_writes(
    served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a graph would copy and read again at its replay stays; what would be made within it is left to torch."""
    from torchreg.kernels import cuda

    model, _, optimizer = made(*SGD[:1], L1, torch.float32, of=Small, **SGD[1])

    def step(capturing: bool, t: int) -> str:
        monkeypatch.setattr(cuda, "capturing", lambda device: capturing)
        give_gradients(model, t)
        optimizer.step()
        return served[-1]

    assert [step(capturing, 0) for capturing in (True, False, True, False)] == ["stock", "triton", "triton", "triton"]
    passes = optimizer._executors[1]
    [(rows, host)] = passes._captured[0].table._captured
    kept, gradients = host.clone(), [w.grad for w in model.parameters()]
    assert torch.equal(rows[: len(gradients) * 8], host[: len(gradients) * 8])
    assert step(False, 1) == "triton"
    assert torch.equal(host, kept)
    assert step(True, 2) == "triton"
    assert step(True, 3) == "stock"  # no memory for a second graph before a step without one
    assert torch.equal(host, kept)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert step(True, 4) == "stock"
    assert passes._captured[0].table._captured[0][1] is host


# ---------------------------------------------------------------------- values and gradients of a penalty

SIZES = [0, 1, 7, 2048, 2049, 5001]


def some(dtype: torch.dtype, strengths: tuple[float, float], anchored: bool) -> tuple[list[Any], list[L1L2]]:
    """Weights of many sizes, a third of them exactly at the penalty's minimum."""
    every, penalties = [], []
    for size in SIZES:
        w, anchor = weights((size,), dtype, seed=size), weights((size,), dtype, seed=1)
        anchor = anchor.where(torch.arange(size) % 3 > 0, w) if anchored else None
        every.append(w.to(DEVICE).requires_grad_())
        penalties.append(L1L2(*strengths, None if anchor is None else anchor.to(DEVICE)))
    return every, penalties


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("strengths", [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)], ids=str)
@pytest.mark.parametrize("anchored", [False, True], ids=["from 0", "from an anchor"])
def test_value_and_gradient_are_those_of_exact_sums(
    dtype: torch.dtype, strengths: tuple[float, float], anchored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHREG_BACKEND", "triton")
    every, penalties = some(dtype, strengths, anchored)
    assert all(l1l2.takes(w, penalty.anchor) for w, penalty in zip(every, penalties, strict=True))
    value = l1l2.value(every, penalties)
    total = math.fsum(map(exactly, every, penalties))
    assert value.device == every[0].device
    assert value.item() == pytest.approx(total, rel=3e-7 if dtype is torch.float32 else 1e-14)
    (1.7 * value).backward()
    found = [w.grad for w in every]
    for w, penalty, gradient in zip(every, penalties, found, strict=True):
        theirs = w.detach().clone().requires_grad_()
        away = theirs if penalty.anchor is None else theirs - penalty.anchor
        (1.7 * (penalty.l1 * away.abs().sum() + penalty.l2 * away.square().sum())).backward()
        assert torch.equal(gradient, theirs.grad)
        w.grad = torch.full_like(w, 0.7) if len(w) != 7 else None
    both = l1l2.add_gradients_(every, penalties)
    assert same_bits(both, value.detach())
    expected = torch.autograd.grad(l1l2.value(every, penalties), every)
    for w, gradient in zip(every, expected, strict=True):
        assert torch.equal(w.grad, gradient + 0.7 if len(w) != 7 else gradient)


@needs_kernels
@needs_new_triton
def test_a_regularizer_in_the_loss_is_one_launch_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchreg.kernels import cuda

    launches: list[int] = []
    run = cuda.kernels.soft.run
    monkeypatch.setattr(cuda.kernels.soft, "run", lambda *a, **k: launches.append(k["TASK"]) or run(*a, **k))
    monkeypatch.setenv("TORCHREG_BACKEND", "triton")
    model = Small(torch.float32)
    reg = tr.Regularizer(model, BOTH)
    value = reg()
    value.backward()
    assert launches == [l1l2.VALUE, l1l2.GRADIENT]
    for w in model.parameters():
        away = w.detach().double()
        torch.testing.assert_close(w.grad.double(), 0.3 * away.sign() + 0.6 * away, rtol=1e-6, atol=0)
    gradient = model.matrix.grad.clone()
    assert same_bits(reg.add_gradient_(), value.detach())
    assert launches[2:] == [l1l2.BOTH]
    assert torch.equal(model.matrix.grad, 2 * gradient)


# ---------------------------------------------------------------------- who serves


@needs_kernels
def test_strength_zero_is_left_to_the_stock_code(served: list[str]) -> None:
    model, reg, optimizer = made(tr.optim.ProxAdam, L1, torch.float32, of=Small)
    for strength in (0.05, 0.0, 0.05):
        reg["l1"].strength = strength
        give_gradients(model, 0)
        optimizer.step()
    with reg.disabled():
        optimizer.step()
    optimizer.step()
    assert served == ["stock", "stock", "triton", "stock", "triton"]


NOT_SERVED = {
    case: asked for case, asked in steps.NOT_SERVED.items() if case not in ("bfloat16", "a fused step of a GradScaler")
}


@needs_kernels
@pytest.mark.parametrize("case", NOT_SERVED)
def test_all_else_is_left_to_the_stock_code(case: str, served: list[str]) -> None:
    asked = dict(NOT_SERVED[case])
    change = asked.pop("change", None)
    model = Small(asked.pop("dtype", torch.float32))
    reg = tr.Regularizer(model, asked.pop("penalty", L1), include=asked.pop("include", None))
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=reg, **asked)
    for t in range(2):
        give_gradients(model, t)
        if change is not None:
            change(model)
        optimizer.step()
    assert served == ["stock", "stock"]
    assert all(w.isfinite().all() for w in model.parameters())


@needs_kernels
def test_a_kernel_that_does_not_compile_leaves_the_step_to_torch(
    served: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torchreg.kernels import cuda

    def broken(*args: Any) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable\nand more")

    monkeypatch.delenv("TORCHREG_BACKEND")
    monkeypatch.setattr(native, "native", lambda: None)
    monkeypatch.setattr(cuda.Table, "try_out", broken)
    monkeypatch.setattr(choice, "_broken", "")
    model, _, optimizer = made(*SGD[:1], L1, torch.float32, of=Small, **SGD[1])
    plain, _, stock = made(*SGD[:1], L1, torch.float32, of=Small, **SGD[1])
    for t in range(3):
        give_gradients(model, t)
        optimizer.step()
    assert served == ["stock"] * 3
    assert [record.message for record in caplog.records] == [
        "Triton's kernels cannot be used, and torch serves in their stead: no C compiler: Failed to find C compiler. "
        "Please specify via CC environment variable"
    ]
    assert tr.backends()["triton"].note.startswith("no C compiler: ")
    monkeypatch.setenv("TORCHREG_BACKEND", "torch")
    for t in range(3):
        give_gradients(plain, t)
        stock.step()
    for w, v in zip(plain.parameters(), model.parameters(), strict=True):
        assert same_bits(w.detach(), v.detach())
    monkeypatch.setenv("TORCHREG_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="=triton, but Triton cannot serve: no C compiler"):
        optimizer.step()


@needs_kernels
def test_the_table_says_that_it_serves_and_another_backend_that_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHREG_BACKEND", "triton")
    assert tr.backends()["triton"].used
    assert not tr.backends()["native"].used
    assert tr.backends()["native"].note
    monkeypatch.setenv("TORCHREG_BACKEND", "torch")
    assert tr.backends()["triton"] == tr.Backend("triton", False, "TORCHREG_BACKEND=torch")


# ---------------------------------------------------------------------- on a GPU alone


def captured(model: nn.Module, optimizer: Any) -> Any:
    """Three steps on a side stream and one captured, as torch's notes on CUDA graphs have it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@needs_gpu
@pytest.mark.parametrize(
    ("kind", "settings"), [SGD, (tr.optim.ProxAdam, {"capturable": True}), FUSED[1]], ids=["SGD", "Adam", "fused AdamW"]
)
def test_a_step_in_a_cuda_graph_is_replayed(
    kind: Any, settings: dict[str, Any], served: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, optimizer = made(kind, L1, torch.float32, **settings)
    give_gradients(model, 0)
    gradients = [w.grad for w in model.parameters()]
    graph = captured(model, optimizer)
    assert served[-1] == "triton"
    for _ in range(2):
        graph.replay()
    give_gradients(model, 0)  # elsewhere in memory: a step outside the graph leaves it alone
    optimizer.step()
    for w, gradient in zip(model.parameters(), gradients, strict=True):
        w.grad = gradient
    graph.replay()
    monkeypatch.setenv("TORCHREG_BACKEND", "torch")
    plain, _, stock = made(kind, L1, torch.float32, **settings)
    for _ in range(3 + 2 + 1 + 1):
        give_gradients(plain, 0)
        stock.step()
    for w, v in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(w, v, rtol=1e-4, atol=1e-5)
        assert torch.equal(w == 0, v == 0)


@needs_gpu
@pytest.mark.parametrize(("kind", "settings"), [SGD, ADAM, FUSED[1]], ids=["SGD", "Adam", "fused AdamW"])
def test_a_step_does_not_wait_for_the_gpu(kind: Any, settings: dict[str, Any], served: list[str]) -> None:
    model, _, optimizer = made(kind, L1, torch.float32, **settings)
    for t in range(4):
        give_gradients(model, t)
        torch.cuda.set_sync_debug_mode("error" if t > 1 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert served == ["stock", *["triton"] * 3]


@needs_gpu
def test_a_real_grad_scaler_skips_and_resumes(served: list[str]) -> None:
    model, _, optimizer = made(*FUSED[0][:1], L1, torch.float32, **FUSED[0][1])
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0)
    for t in range(4):
        optimizer.zero_grad()
        loss = model.matrix.square().sum() * (torch.inf if t == 2 else 1.0)
        scaler.scale(loss).backward()
        before = model.matrix.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model.matrix) == (t == 2)
    assert served == ["stock", *["triton"] * 3]
