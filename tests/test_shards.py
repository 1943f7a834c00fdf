"""Weights that DDP, fully_shard and tensor parallelism divide among processes: the same zeros as in one process."""

from __future__ import annotations

import dataclasses
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchreg as tr

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
    return {name: tr.checks.unsharded(w.detach()).clone() for name, w in model.named_parameters()}


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
LAYOUTS = {2: [replicas, fsdp, tensor_parallel], 4: [fsdp, both, hybrid]}
FEW = [
    "l1, adam",
    "columns, adam",
    "columns, sgd",
    "rows, adam",
    "columns in the loss",
    "l1 in the loss",
    "toward, adam",
]


def work(rank: int, world: int, folder: Path) -> None:
    """What each process does. One that waits for another in vain is an error after a minute."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world, timeout=timedelta(seconds=10)
    )
    found: dict[tuple[str, str], Any] = {}
    for shard in LAYOUTS[world]:
        for name in TRAININGS if world == 2 else FEW:
            try:
                found[shard.__name__, name] = TRAININGS[name].run(shard, world)
            except Exception:
                traceback.print_exc()
                print("IN", rank, shard.__name__, name, flush=True)
                raise
    torch.save(found, folder / f"found.{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
