"""TensorBoardMonitor in two processes: one of them writes, and sharded weights are counted as wholes."""

from __future__ import annotations

import contextlib
import json
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

import torchreg as tr
from tests.models import SHARDS, batch, mlp
from tests.views.test_monitor import pictures, scalars, texts

pytestmark = pytest.mark.skipif(not SHARDS, reason="processes on gloo, with a fully_shard that runs on a CPU")


def model() -> nn.Module:
    """Some zeros, a dead input, and rows that do not divide by two."""
    net = mlp()
    with torch.no_grad():
        net.fc1.weight[:, 2] = 0
        net.fc1.weight[0] = 0
        net.fc2.weight[1, 1:] = 0
    return net


def step(net: nn.Module, reg: tr.Regularizer) -> torch.optim.Optimizer:
    """Takes a step with a prox; what comes back carries it."""
    optimizer = tr.optim.ProxAdam(net.parameters(), lr=1e-2, regularizer=reg)
    x, y = batch()
    nn.functional.mse_loss(net(x), y).backward()
    optimizer.step()
    return optimizer


def log(reg: tr.Regularizer, folder: Path, full: bool = False) -> None:
    with tr.TensorBoardMonitor(folder, reg, every=2, images_every=2, budget=None) as monitor:
        for step in range(4):
            monitor.log(step, loss=torch.tensor(float(step)))
            if full and step == 1:
                import resource

                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def work(rank: int, folder: Path) -> None:
    """What each process does. One that waits for the other in vain is an error after a minute."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    caught: dict[str, list[str]] = {}
    sharded = model()
    for layer in (sharded.fc1, sharded.fc2, sharded):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    regs = {"replicas": tr.Regularizer(nn.parallel.DistributedDataParallel(model()), tr.L1(1e-2))}
    regs["shards"] = regs["full"] = tr.Regularizer(sharded, tr.L1(1e-2))
    for run, reg in regs.items():
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", UserWarning)
            log(reg, folder / run, full=run == "full" and rank == 0)
        caught[run] = [str(w.message) for w in found if "TensorBoardMonitor" in str(w.message)]
    optimizer = step(sharded, regs["shards"])
    stepped = tr.measure(regs["shards"])
    optimizer.attachment.remove()
    (folder / f"stepped.{rank}.json").write_text(json.dumps(stepped))
    (folder / f"caught.{rank}.json").write_text(json.dumps(caught))
    monitor = tr.TensorBoardMonitor(folder / "raised", regs["shards"])
    monitor.log(0)
    if rank == 1:
        with contextlib.suppress(KeyError), monitor:
            raise KeyError  # and rank 0 does not come to gather with it
        (folder / "went on").touch()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    torch.multiprocessing.spawn(work, (folder,), nprocs=2)
    return folder


@pytest.mark.parametrize("run", ["replicas", "shards"])
def test_one_process_writes_one_run(folder, run):
    assert len(list((folder / run).iterdir())) == 1
    found = scalars(folder / run)
    assert found["overview/loss"] == {0: 0, 2: 2, 3: 3}
    assert list(found["overview/sparsity"]) == [0, 2, 3]


@pytest.mark.parametrize("run", ["replicas", "shards"])
def test_shards_are_counted_as_wholes(folder, run):
    expected = tr.measure(tr.Regularizer(model(), tr.L1(1e-2)))
    found = scalars(folder / run)
    assert expected.keys() <= found.keys()
    for tag, value in expected.items():
        assert found[tag][0] == pytest.approx(value), tag


def test_the_threshold_of_shards_is_that_of_wholes(folder):
    reg = tr.Regularizer(net := model(), tr.L1(1e-2))
    optimizer = step(net, reg)
    expected = {key: value for key, value in tr.measure(reg).items() if key.startswith("threshold/")}
    assert optimizer.attachment.active
    assert all(value > 0 for value in expected.values())
    for rank in (0, 1):
        found = json.loads((folder / f"stepped.{rank}.json").read_text())
        assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_shards_are_drawn_as_wholes(folder):
    shards, replicas = pictures(folder / "shards"), pictures(folder / "replicas")
    assert shards.keys() == replicas.keys()
    assert all((shards[tag] == replicas[tag]).all() for tag in shards)
    assert texts(folder / "shards")["about/1_summary"] == texts(folder / "replicas")["about/1_summary"]


def test_a_full_disk_of_one_process_leaves_none_waiting(folder):
    caught = [json.loads((folder / f"caught.{rank}.json").read_text()) for rank in (0, 1)]
    assert [len(found["full"]) for found in caught] == [1, 0]
    assert [len(found[run]) for found in caught for run in ("replicas", "shards")] == [0, 0, 0, 0]
    assert list(scalars(folder / "full")["overview/loss"]) == [0]


def test_a_process_that_raises_does_not_wait_for_the_others(folder):
    assert (folder / "went on").exists()
