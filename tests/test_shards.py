"""Weights that DDP, fully_shard and tensor parallelism divide among processes: the same zeros as in one process."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchreg as tr
from torchreg import checks

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()) or sys.platform == "win32",
    reason="processes on gloo",
)

STEPS = 25


class Net(nn.Module):
    """fc1 6→4, fc2 4→3: three rows do not divide by two, and leave one process of four without any."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(6, 4)
        self.fc2 = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def pretrained() -> dict[str, Tensor]:
    """Where `toward` pulls."""
    return {name: torch.round(4 * w) / 4 for name, w in net().state_dict().items()}


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    return x, y + x[:, :3]


def loss_of(model: nn.Module) -> Tensor:
    x, y = batch()
    return nn.functional.mse_loss(model(x), y)


# ---------------------------------------------------------------------- layouts


def _fsdp(model: Net, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.fc1, mesh=mesh)
    fully_shard(model, mesh=mesh)  # fc2 stays unsharded from the forward to the end of the backward


def _tensor_parallel(model: Net, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    parallelize_module(model, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})


def fsdp(model: Net, world: int) -> nn.Module:
    from torch.distributed.tensor import init_device_mesh

    _fsdp(model, init_device_mesh("cpu", (world,)))
    return model


def tensor_parallel(model: Net, world: int) -> nn.Module:
    from torch.distributed.tensor import init_device_mesh

    _tensor_parallel(model, init_device_mesh("cpu", (world,)))
    return model


def both(model: Net, world: int) -> nn.Module:
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    _tensor_parallel(model, mesh["tensor"])
    _fsdp(model, mesh["data"])
    return model


def replicas(model: Net, world: int) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def hybrid(model: Net, world: int) -> nn.Module:
    from torch.distributed.tensor import init_device_mesh

    _fsdp(model, init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("replicas", "shards")))
    return model


def alone(model: Net, world: int) -> nn.Module:
    return model


# ---------------------------------------------------------------------- trainings


@dataclasses.dataclass(frozen=True)
class Training:
    """One training: a penalty and the way in which it acts."""

    penalty: tr.Penalty
    optimizer: Callable[[Any, tr.Regularizer], torch.optim.Optimizer] | None = None  # None: in the loss
    toward: bool = False
    late: bool = False  # the regularizer is built before the model is sharded

    def run(self, shard: Callable[[Net, int], nn.Module], world: int) -> dict[str, Tensor]:
        """The weights in the end, as wholes, and `reg()` of the first and the last step."""
        model = net()
        anchors = pretrained() if self.toward else None
        reg = tr.Regularizer(model, self.penalty, toward=anchors) if self.late else None
        wrapped = shard(model, world)
        reg = reg or tr.Regularizer(wrapped, self.penalty, toward=anchors)
        params = list(wrapped.parameters())
        optimizer = torch.optim.SGD(params, lr=0.05) if self.optimizer is None else self.optimizer(params, reg)
        totals = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(wrapped)
            total = reg()
            (loss + total).backward()
            optimizer.step()
            totals.append(total.detach())
        return {**whole(model), "first": totals[0], "last": totals[-1]}


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: checks.unsharded(w.detach()).clone() for name, w in model.named_parameters()}


def sgd(params: Any, reg: tr.Regularizer) -> torch.optim.Optimizer:
    return tr.optim.ProxSGD(params, lr=0.02, momentum=0.9, regularizer=reg)


def adam(params: Any, reg: tr.Regularizer) -> torch.optim.Optimizer:
    return tr.optim.ProxAdam(params, lr=0.02, regularizer=reg)


def adamw(params: Any, reg: tr.Regularizer) -> torch.optim.Optimizer:
    return tr.optim.ProxAdamW(params, lr=0.02, regularizer=reg)


def attached(kind: type[torch.optim.Optimizer], **settings: Any) -> Any:
    def make(params: Any, reg: tr.Regularizer) -> torch.optim.Optimizer:
        optimizer = kind(params, **settings)
        tr.optim.attach(optimizer, reg)
        return optimizer

    return make


WEIGHTS = [0.5, 1.0, 2.0]
SOFT = {"l1": tr.L1(0.05), "elastic net": tr.ElasticNet(0.05, 0.01)}
GROUPED = {
    "rows": tr.GroupLasso(0.05),
    "columns": tr.GroupLasso(0.05, tr.Columns()),
    "sparse columns": tr.SparseGroupLasso(0.02, 0.03, tr.Columns()),
}
TRAININGS = {
    **{f"{name}, {make.__name__}": Training(p, make) for name, p in SOFT.items() for make in (sgd, adam, adamw)},
    **{f"{name}, {make.__name__}": Training(p, make) for name, p in GROUPED.items() for make in (sgd, adam)},
    **{f"{name} in the loss": Training(p) for name, p in (SOFT | GROUPED).items()},
    "l1, SGD": Training(tr.L1(0.05), attached(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True)),
    "l1, Adagrad": Training(tr.L1(0.05), attached(torch.optim.Adagrad, lr=0.05)),
    "l1, RMSprop": Training(tr.L1(0.05), attached(torch.optim.RMSprop, lr=0.01, centered=True)),
    "l1, NAdam": Training(tr.L1(0.05), attached(torch.optim.NAdam, lr=0.02)),
    "columns, Adadelta": Training(tr.GroupLasso(0.05, tr.Columns()), attached(torch.optim.Adadelta, lr=1.0)),
    "reweighted, adam": Training(tr.Reweighted(tr.MCP(0.05)), adam),
    "toward, adam": Training(tr.L1(0.05), adam, toward=True),
    "toward, columns, adam": Training(tr.GroupLasso(0.05, tr.Columns()), adam, toward=True),
    "toward in the loss": Training(tr.L2(0.05), toward=True),
    "before sharding, sgd": Training(tr.L1(0.05), sgd, late=True),
    "before sharding, toward, adam": Training(tr.L1(0.05), adam, toward=True, late=True),
    "before sharding, in the loss": Training(tr.ElasticNet(0.05, 0.01), late=True),
}
ONLY = {replicas: ["l1, sgd", "l1 in the loss", "before sharding, toward, adam"]}
LAYOUTS = {2: [replicas, fsdp, tensor_parallel], 4: [fsdp, both, hybrid]}
FEW = ["l1, adam", "columns, adam", "columns, sgd", "columns in the loss", "toward, adam"]


# ---------------------------------------------------------------------- all that reads weights

Shard = Callable[[Net, int], nn.Module]


def trained(shard: Shard, world: int, penalty: tr.Penalty, steps: int = 10) -> tuple[Any, ...]:
    model = shard(net(), world)
    reg = tr.Regularizer(model, penalty)
    optimizer = tr.optim.ProxSGD(model.parameters(), lr=0.1, regularizer=reg)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return model, reg, optimizer


def counts(shard: Shard, world: int) -> Any:
    model, reg, _ = trained(shard, world, tr.L1(0.2))
    with torch.no_grad():
        model(batch()[0])  # leaves the outermost weights whole
    return tr.sparsity(reg).to_dict(), tr.sparsity(model).to_dict(), reg.explain(), [w.item() for w in (reg(),)]


def certificates(shard: Shard, world: int) -> Any:
    found = []
    for penalty in (tr.L1(0.2), tr.GroupLasso(0.1, tr.Columns()), tr.SparseGroupLasso(0.1, 0.1)):
        model, reg, optimizer = trained(shard, world, penalty)
        before = whole(model)
        with torch.no_grad():
            model(batch()[0])

        def loss(model: nn.Module = model) -> Tensor:
            return loss_of(model)

        certified = tr.stationarity(reg, loss)
        found += [*tr.lambda_max(reg, loss).values(), certified.total, certified.relative, certified.rest]
        assert all(torch.equal(w, before[name]) for name, w in whole(model).items())
    return found


def gradients(shard: Shard, world: int) -> Any:
    """Of `add_gradient_`, beside a loss of which every process has a part."""
    model = shard(net(), world)
    reg = tr.Regularizer(model, {"fc1.weight": tr.ElasticNet(0.1, 0.05), "fc2.weight": tr.GroupLasso(0.1)})
    loss_of(model).backward()
    value = reg.add_gradient_()
    parts = reg.components()
    grads = {name: checks.unsharded(w.grad) for name, w in model.named_parameters()}
    return value, sum(parts.values()), {name.removeprefix("module."): grad for name, grad in grads.items()}


def proxes(shard: Shard, world: int) -> Any:
    model = shard(net(), world)
    found = {}
    for penalty in (tr.L1(0.2), tr.MCP(0.2), tr.GroupLasso(0.05), tr.SparseGroupLasso(0.02, 0.05, tr.Columns())):
        reg = tr.Regularizer(model, penalty)
        for name, w in reg.named_parameters():
            step = w.detach().abs() + 0.5
            for kind, s in {"number": 0.5, "tensor": step, "row": torch.full((w.shape[-1],), 0.5)}.items():
                if kind != "row" or penalty.separable:
                    found[f"{penalty} {name} {kind}"] = checks.unsharded(penalty.prox(w.detach(), s))
        reg.prox_(0.1)
    weighted = tr.GroupLasso(0.05, tr.Columns(), group_weights=[0.0, 1.0, 2.0, 4.0])
    weighted_rows = tr.GroupLasso(0.05, group_weights=[0.0, 1.0, 3.0])
    w = dict(tr.Regularizer(model, tr.L1(0.0)).named_parameters())["fc2.weight"].detach()
    for penalty in (weighted, weighted_rows):
        for s in (0.5, w.abs() + 0.5):
            found[f"{penalty} {s}"] = checks.unsharded(penalty.prox(w, s))
        found[f"{penalty}"] = penalty(w)
    return list(found.values()), whole(model)


def refits(shard: Shard, world: int) -> Any:
    model, reg, optimizer = trained(shard, world, tr.L1(0.2))
    optimizer.attachment.remove()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    norms = []
    with reg.disabled(), tr.freeze_zeros(reg, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model).backward()
            norms.append(checks.unsharded(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.step()
    return norms, whole(model)


def targets(shard: Shard, world: int) -> Any:
    model = shard(net(), world)
    reg = tr.Regularizer(model, tr.L1(0.1))
    optimizer = tr.optim.ProxAdam(model.parameters(), lr=0.02, regularizer=reg)
    target = tr.TargetSparsity(reg, 0.5, total_steps=50)
    for _ in range(50):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        target.step()
    return target.sparsity, target.factor, whole(model)


PROBES = {probe.__name__: probe for probe in (counts, certificates, gradients, proxes, refits, targets)}


# ---------------------------------------------------------------------- processes


def work(rank: int, world: int, folder: Path) -> None:
    """What each process does. One that waits for another in vain is an error after a minute."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    found: dict[tuple[str, str], Any] = {}
    for shard in LAYOUTS[world]:
        for name in ONLY.get(shard, TRAININGS) if world == 2 else FEW:
            found[shard.__name__, name] = TRAININGS[name].run(shard, world)
        for name in PROBES if world == 2 and shard is not replicas else []:
            found[shard.__name__, name] = PROBES[name](shard, world)
    torch.save(found, folder / f"found.{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
