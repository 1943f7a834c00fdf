"""A long training holds no more memory at its end than at its beginning."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchreg as tr


def resident() -> int:
    """Bytes of this process's memory; 0 where the system does not tell."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def counted() -> tuple[int, int]:
    """How many objects the garbage collector knows, and how many of them are tensors."""
    gc.collect()
    objects = gc.get_objects()  # some warn when they are asked for their class: `isinstance` would
    return len(objects), sum(issubclass(type(x), Tensor) for x in objects)


def soak(steps: int, tmp_path: Path) -> list[tuple[int, int, int]]:
    """Objects, tensors and memory at a tenth, half and the end of a training that uses most of the library."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    half = nn.Linear(16, 3, dtype=torch.bfloat16)
    reg, reg2 = tr.Regularizer(model, tr.L1(1e-3)), tr.Regularizer(half, tr.L1(1e-3))
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.9)
    tr.optim.attach(optimizer, reg)
    swap_in = tr.optim.ProxAdam(half.parameters(), lr=1e-3, regularizer=reg2)
    trainers: list[Any] = [
        (model, reg, optimizer, tr.TargetSparsity(reg, 0.5, total_steps=steps)),
        (half, reg2, swap_in, tr.Schedule(reg2, tr.schedules.Linear(0, 1, steps=steps))),
    ]
    x = torch.randn(8, 16)
    marks, at = [], {steps // 10, steps // 2, steps}
    with tr.TensorBoardMonitor(tmp_path, reg, every=steps // 50, images_every=0) as monitor:
        for step in range(1, steps + 1):
            for net, own, optimizer, moving in trainers:
                loss = net(x.to(next(net.parameters()).dtype)).float().square().mean() + own()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                moving.step()
            monitor.log(step, loss=loss)
            if step in at:
                marks.append((*counted(), resident()))
    return marks


def assert_flat(marks: list[tuple[int, int, int]]) -> None:
    (objects, tensors, _), middle, end = marks
    assert end[0] <= objects * 1.02 + 200
    assert end[1] <= tensors + 20
    assert end[2] <= middle[2] + 8 * 2**20


filtered = pytest.mark.filterwarnings(
    "ignore:half of the steps", "ignore:the penalty had zeroed", "ignore:.* were wished"
)


@filtered
def test_memory_is_flat_over_five_thousand_steps(tmp_path: Path) -> None:
    assert_flat(soak(5_000, tmp_path))


@filtered
@pytest.mark.slow
def test_memory_is_flat_over_two_hundred_thousand_steps(tmp_path: Path) -> None:
    assert_flat(soak(200_000, tmp_path))


def test_the_counts_see_a_leak() -> None:
    before = counted()
    kept = [torch.ones(1) for _ in range(100)]
    after = counted()
    assert after[1] >= before[1] + len(kept)
