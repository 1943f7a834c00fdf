"""What watching costs: iterations of the main job with a monitor, against the same iterations without one.

    python benchmarks/monitor.py             # five minutes
    python benchmarks/monitor.py --short     # one

1. LeNet-300-100 on MNIST-sized data, batch 128, ProxAdam: blocks of iterations with and without a monitor, alternating
   in one process. `time` is the median over the rounds of block with / block without; its spread from the 10th to the
   90th percentile. Pictures, files and all that a user pays for are in it.
2. One look, `measure(reg)`, against three `.item()` of each weight (zeros, Σ|w|, Σw²) and against an iteration.
3. Memory and file size over many steps.

Pass `--json PATH` for the numbers.
"""

import argparse
import json
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path

import torch
from torch import nn

import torchreg as tr
from torchreg._tables import render_table

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--short", action="store_true", help="fewer rounds")
parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
parser.add_argument("--json", type=Path, help="write the numbers there")
args = parser.parse_args()
torch.set_num_threads(args.threads)
torch.set_flush_denormal(True)
torch.manual_seed(0)
folder = Path(tempfile.mkdtemp())
rounds, block = (30, 100) if args.short else (100, 200)
results = {}
# One thread is timed by its own processor time, which other programs on the machine disturb least.
clock = time.thread_time if args.threads == 1 else time.perf_counter

x, y = torch.rand(60_000, 784), torch.randint(0, 10, (60_000,))


class Training:
    """The loop of the main job, a block of iterations at a time."""

    def __init__(self, **monitor):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
        self.reg = tr.Regularizer(self.model, tr.L1(3e-4))
        self.criterion = tr.RegularizedLoss(nn.CrossEntropyLoss(), self.reg)
        self.optimizer = tr.optim.ProxAdam(self.model.parameters(), lr=1e-3, fused=True, regularizer=self.reg)
        self.monitor = tr.TensorBoardMonitor(folder / str(id(self)), self.reg, **monitor) if monitor else None
        self.step, self.left = 0, time.perf_counter()

    def run(self, iterations):
        if self.monitor is not None:  # its budget is a share of its own training's time, not of the others'
            away = time.perf_counter() - self.left
            self.monitor._measuring._started += away
            self.monitor._drawing._started += away
        started = clock()
        for _ in range(iterations):
            batch = torch.randint(len(x), (128,))
            loss = self.criterion(self.model(x[batch]), y[batch])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.monitor is not None:
                self.monitor.log(self.step, loss=self.criterion.last)
            self.step += 1
        self.left = time.perf_counter()
        return (clock() - started) / iterations


def spread(values):
    cuts = statistics.quantiles(values, n=10)
    return f"{statistics.median(values):.3f}", f"{cuts[0]:.3f} to {cuts[-1]:.3f}"


def show(title, columns, rows):
    print(f"\n{title}\n\n{render_table(columns, rows, right=range(1, len(columns)))}", flush=True)
    results[title] = [dict(zip(columns, row, strict=True)) for row in rows]


# ------------------------------------------------------------------ 1. an iteration

settings = {
    "every=1": {"every": 1},
    "every=10": {"every": 10},
    "every=100": {"every": 100},
    "every=1, budget=None": {"every": 1, "budget": None},
    "every=10, budget=None": {"every": 10, "budget": None},
}
# A training without a monitor for each with one: both have taken the same steps, and come to be as sparse.
pairs = {name: (Training(), Training(**setting)) for name, setting in settings.items()}
for pair in pairs.values():
    for training in pair:
        training.run(block)
ratios = {name: [] for name in pairs}
for round_ in range(rounds):
    for name, pair in pairs.items():
        times = [training.run(block) for training in (pair if round_ % 2 else pair[::-1])]
        plain, watched = times if round_ % 2 else times[::-1]
        ratios[name].append(watched / plain)
rows = []
for name, (_, training) in pairs.items():
    files = sum(path.stat().st_size for path in (folder / str(id(training))).iterdir())
    looks = training.monitor._history._seen
    rows.append([name, *spread(ratios[name]), str(looks), f"{files / training.step * 1000 / 1e3:.0f}"])
show("1. an iteration, with a monitor / without", ["monitor", "time", "spread", "looks", "kB per 1000 steps"], rows)

# ------------------------------------------------------------------ 2. a look


def items():
    for w in training.model.parameters():
        if w.dim() > 1:
            (w == 0).sum().item(), w.abs().sum().item(), w.square().sum().item()


def timed(function):
    started = clock()
    function()
    return clock() - started


training = Training()
training.run(block)
times = [(timed(lambda: tr.measure(training.reg)), timed(items), training.run(1)) for _ in range(10 * rounds)]
looks, naive, iteration = (statistics.median(column) for column in zip(*times, strict=True))
show(
    "2. one look",
    ["measure(reg)", "ratio"],
    [["to three .item() a weight", f"{looks / naive:.2f}"], ["to an iteration", f"{looks / iteration:.2f}"]],
)

# ------------------------------------------------------------------ 3. memory

small = nn.Sequential(nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 2))
reg = tr.Regularizer(small, tr.L1(1e-3))
count = 10_000 if args.short else 100_000
rows = []
with tr.TensorBoardMonitor(folder / "long", reg, every=10) as monitor:
    tracemalloc.start()
    for step in range(count):
        monitor.log(step, loss=1.0 / (1 + step))
        if step + 1 in (count // 10, count // 2, count):
            rows.append([f"{step + 1:,}", f"{tracemalloc.get_traced_memory()[0] / 1e3:.0f}"])
tracemalloc.stop()
show("3. memory of Python after so many steps", ["steps", "kB"], rows)
if args.json:
    args.json.write_text(json.dumps(results, indent=2))
