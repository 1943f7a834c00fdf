"""A run goes on from its checkpoint: killed at any moment, in a wrapper, in another optimizer class, from old files."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import torchreg as tr
from tests import ROOT
from tests.models import batch, mlp, same, snapshot

# ---------------------------------------------------------------------- killed

TRAINING = """
import os, random, re, signal, sys, time
from pathlib import Path

import torch
from torch import nn

import torchreg as tr

folder, kills, total = Path(sys.argv[1]), int(sys.argv[2]), 120
shown = re.findall("```python\\n(.*?)```", Path("docs/checkpoints.md").read_text(encoding="utf-8"), re.DOTALL)
for code in shown[:2]:
    exec(code)  # save and load, as the page has them


def build(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    model.to(torch.bfloat16 if kind == "bfloat16" else torch.float32)
    reg = tr.Regularizer(model, tr.L1(1e-2))
    parts = {"model": model, "reg": reg}
    if kind == "momentum":
        parts["optimizer"] = tr.optim.ProxSGD(model.parameters(), lr=0.02, momentum=0.9, regularizer=reg)
    elif kind == "attached":
        parts["optimizer"] = torch.optim.AdamW(model.parameters(), lr=0.01)
        tr.optim.attach(parts["optimizer"], reg)
    else:
        parts["optimizer"] = tr.optim.ProxAdam(model.parameters(), lr=0.01, regularizer=reg)
    if kind == "schedule":
        parts["schedule"] = tr.Schedule(reg, tr.schedules.Cosine(0, 1, steps=total))
    if kind == "target":
        parts["target"] = tr.TargetSparsity(reg, 0.8, total_steps=total)
    return parts


def train(kind, file, until):
    parts, step = build(kind), 0
    model, optimizer, moving = parts["model"], parts["optimizer"], list(parts.values())[3:]
    torch.manual_seed(1)
    if file.exists():
        step = load(file, parts)
    for step in range(step, until):
        x = torch.randn(8, 20).to(model[0].weight.dtype)
        optimizer.zero_grad()
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()
        for part in moving:
            part.step()
        if step % 4 == 3:
            save(file, step + 1, parts)
    while until < total:  # until it is killed: in the middle of a save as well
        save(file, until, parts)


def forked(*arguments):
    child = os.fork()
    if not child:
        train(*arguments)
        os._exit(0)
    return child


torch.set_num_threads(1)  # in a child of a process that has used OpenMP's threads, these hang
random.seed(0)
for kind in ("momentum", "bfloat16", "attached", "schedule", "target"):
    train(kind, folder / f"{kind}_whole.pt", total)  # and what it imports, the children have
    file = folder / f"{kind}_killed.pt"
    for kill in range(kills):
        before = file.stat().st_mtime_ns if file.exists() else 0
        child = forked(kind, file, total * (kill + 1) // (kills + 1))
        while not (file.exists() and file.stat().st_mtime_ns > before):
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert os.waitpid(forked(kind, file, total), 0)[1] == 0
"""


def killed(folder: Path, kills: int) -> Path:
    """Runs that were killed so often, and beside each the same run that was not."""
    # Without a GPU: autograd's threads for it do not live on in a forked process.
    without = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", TRAINING, str(folder), str(kills)]
    subprocess.run(command, check=True, cwd=ROOT, env=without, timeout=300)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return killed(tmp_path_factory.mktemp("killed"), kills=6)


def identical(a: Any, b: Any) -> bool:
    """Two states, to the last bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b


def ends(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{kind}_{how}.pt", weights_only=True) for how in ("whole", "killed")]


every_kind = pytest.mark.parametrize("kind", ["momentum", "bfloat16", "attached", "schedule", "target"])
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process that it forked")


@forks
@every_kind
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(kind: str, runs: Path) -> None:
    whole, resumed = ends(runs, kind)
    assert whole["step"] == 120
    assert identical(whole, resumed)
    zeros = (whole["model"]["0.weight"] == 0).float().mean()
    assert 0.02 < zeros < 1


@forks
@pytest.mark.slow
def test_a_run_that_is_killed_sixty_times_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    killed(tmp_path, kills=60)
    for kind in ("momentum", "bfloat16", "attached", "schedule", "target"):
        assert identical(*ends(tmp_path, kind)), kind


# ---------------------------------------------------------------------- wrapped


@pytest.fixture
def process_group(tmp_path: Path) -> Any:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


WRAPPERS = [compiled, nn.DataParallel, DistributedDataParallel, AveragedModel]


def trainer(model: nn.Module) -> tuple[nn.Module, tr.Regularizer, Any]:
    linear = (nn.Linear, "weight")
    reg = tr.Regularizer(
        model, [("fc1.*", tr.L1(2e-2)), (linear, tr.ElasticNet(1e-2, 1e-3)), (nn.LayerNorm, tr.L2(0.1))]
    )
    return model, reg, tr.optim.ProxAdam(model.parameters(), lr=0.02, regularizer=reg)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x, y = batch(step)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def inner(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", None) or getattr(model, "module", model)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("direction", ["into the wrapper", "out of the wrapper"])
def test_states_load_into_a_wrapper_and_out_of_it(wrap: Any, direction: str) -> None:
    model, _, optimizer = trainer(mlp())
    train(model, optimizer, range(8))

    first, second = (lambda m: m, wrap) if direction == "into the wrapper" else (wrap, lambda m: m)
    before, reg, optimizer = trainer(first(mlp()))
    train(before, optimizer, range(4))
    after, reg2, optimizer2 = trainer(second(mlp(1)))
    reg2["fc1.*"].strength = 0.7
    inner(after).load_state_dict(inner(before).state_dict())
    reg2.load_state_dict(reg.state_dict())
    optimizer2.load_state_dict(optimizer.state_dict())
    train(after, optimizer2, range(4, 8))
    assert same(snapshot(model), snapshot(inner(after)))
    assert [name for name, _ in reg2.named_parameters()] == [name for name, _ in reg.named_parameters()]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", WRAPPERS[:3], ids=lambda wrap: wrap.__name__)
def test_wrapped_and_unwrapped_in_mid_training_it_trains_as_ever(wrap: Any) -> None:
    model, _, optimizer = trainer(mlp())
    train(model, optimizer, range(9))
    other, reg, optimizer = trainer(mlp())
    for part, steps in ((other, range(3)), (wrap(other), range(3, 6)), (other, range(6, 9))):
        train(part, optimizer, steps)
        assert reg().isfinite()
    assert same(snapshot(model), snapshot(other))


# ---------------------------------------------------------------------- stock classes and old files

PAIRS = [
    (torch.optim.SGD, tr.optim.ProxSGD, {"momentum": 0.9}),
    (torch.optim.Adam, tr.optim.ProxAdam, {}),
    (torch.optim.AdamW, tr.optim.ProxAdamW, {"weight_decay": 0.1}),
]
every_pair = pytest.mark.parametrize(("stock", "swap_in", "settings"), PAIRS, ids=lambda x: getattr(x, "__name__", ""))


def loaded(kind: Any, state: dict[str, Any], weights: dict[str, Tensor], strength: float | None) -> Any:
    """A model and its optimizer of this class, made with other settings than those of the state, which it loads."""
    model = mlp(1)
    model.load_state_dict(weights)
    reg = tr.Regularizer(model, tr.L1(strength or 0.0))
    arguments = {} if strength is None else {"regularizer": reg}
    optimizer = kind(model.parameters(), lr=0.5, **arguments)
    optimizer.load_state_dict(copy.deepcopy(state))
    return model, optimizer


@pytest.mark.parametrize("how", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@every_pair
def test_the_settings_of_a_stock_checkpoint_are_taken_over(stock: Any, swap_in: Any, settings: Any, how: Any) -> None:
    model = mlp()
    optimizer = stock(model.parameters(), lr=0.02, **settings, **how)
    train(model, optimizer, range(4))
    other, optimizer2 = loaded(swap_in, optimizer.state_dict(), model.state_dict(), 0.0)
    back, optimizer3 = loaded(stock, optimizer2.state_dict(), other.state_dict(), None)
    for one, own in ((model, optimizer), (other, optimizer2), (back, optimizer3)):
        train(one, own, range(4, 8))
    assert same(snapshot(model), snapshot(other))
    assert same(snapshot(model), snapshot(back))
    group = optimizer2.param_groups[0]
    assert {key: group[key] for key in how} == how


@every_pair
def test_a_checkpoint_of_an_old_torch_loads(stock: Any, swap_in: Any, settings: Any) -> None:
    model = mlp()
    optimizer = stock(model.parameters(), lr=0.02, **settings)
    train(model, optimizer, range(4))
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:  # as torch 1.9 wrote it: fewer settings, and a step that is a number
        for key in {"foreach", "fused", "maximize", "capturable", "differentiable", "decoupled_weight_decay"} & set(
            group
        ):
            del group[key]
    for state in old["state"].values():
        state.update({"step": int(state["step"])} if "step" in state else {})
    expected, stock_optimizer = loaded(stock, old, model.state_dict(), None)
    same_as_stock, optimizer2 = loaded(swap_in, old, model.state_dict(), 0.0)
    penalized, optimizer3 = loaded(swap_in, old, model.state_dict(), 0.1)
    train(expected, stock_optimizer, range(4, 8))
    train(same_as_stock, optimizer2, range(4, 8))
    train(penalized, optimizer3, range(4, 40))
    assert same(snapshot(expected), snapshot(same_as_stock))
    assert tr.sparsity(penalized).fraction > 0.5


# ---------------------------------------------------------------------- weights alone


def test_safetensors_keep_exact_zeros_and_ties(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(12, 6), nn.Linear(6, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    def made() -> tuple[Tied, Any]:
        model = Tied()
        reg = tr.Regularizer(model, tr.L1(0.1), include="head.weight")
        return model, tr.optim.ProxSGD(model.parameters(), lr=0.5, regularizer=reg)

    def steps(model: Tied, optimizer: Any) -> None:
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.arange(12)), torch.arange(12)).backward()
            optimizer.step()

    torch.manual_seed(0)
    model, optimizer = made()
    steps(model, optimizer)
    save_model(model, os.fspath(tmp_path / "model.safetensors"))
    [stored] = load_file(tmp_path / "model.safetensors").values()  # once
    other, optimizer2 = made()
    load_model(other, os.fspath(tmp_path / "model.safetensors"))
    assert other.head.weight is other.embed.weight
    assert torch.equal(stored, model.head.weight)
    assert tr.sparsity(other, "head.weight").zeros == int((stored == 0).sum()) > 0
    steps(model, optimizer)
    steps(other, optimizer2)
    assert torch.equal(model.head.weight, other.head.weight)


def test_the_page_shows_the_way_that_is_tested() -> None:
    page = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    save, load, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "os.fsync" in save
    assert save.index("os.fsync") < save.index("os.replace")
    assert "weights_only=True" in load
